"""How endpoints are reached and recognised: plain, or mutual TLS under one leaf."""

import ssl
from collections.abc import Callable
from typing import Protocol

from mesh.errors import InvalidIdentity


class Transport(Protocol):
    """How to reach and recognise the endpoints of a target: replaced as a whole when a leaf or its peers change."""

    @property
    def context(self) -> ssl.SSLContext | None: ...
    @property
    def server_name(self) -> str | None: ...
    def verify(self, tls: ssl.SSLObject) -> None:
        """Raises InvalidIdentity unless the peer is one of the expected."""


class PlainTransport:
    """To the local application."""

    context: ssl.SSLContext | None = None
    server_name: str | None = None

    def verify(self, tls: ssl.SSLObject) -> None:
        """Nothing to verify: it is never TLS."""


class MutualTls:
    """To other sidecars: one per leaf, bundle and set of expected identities."""

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_name: str,
        expected_spiffe_ids: tuple[str, ...],
        identify: Callable[[ssl.SSLObject], str],
    ) -> None:
        self.context: ssl.SSLContext | None = context
        self.server_name: str | None = server_name or None
        self.expected = frozenset(expected_spiffe_ids)
        self._identify = identify

    def verify(self, tls: ssl.SSLObject) -> None:
        """Raises InvalidIdentity unless the server proves one of the expected SPIFFE IDs."""
        spiffe_id = self._identify(tls)
        if spiffe_id not in self.expected:
            raise InvalidIdentity(f"{spiffe_id} is not among the expected {', '.join(sorted(self.expected))}")
