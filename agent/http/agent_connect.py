"""/v1/agent/connect: roots, leaves and authorization for applications that speak mTLS themselves."""

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from agent.backend import Backend
from agent.http.family import StateFamily
from agent.http.request import ApiRequest, ApiResponse, Route, index_header, json_response
from agent.http.shapes import ca_roots_shape, rfc3339
from agent.leaves import Leaf
from agent.strict_json import Fields
from mesh.authz import authorize
from mesh.errors import InvalidIdentity, InvalidRequest
from mesh.model.query import GetCaRoots, MatchIntentions, ReadOptions
from mesh.names import parse_spiffe_id


class Leaves(Protocol):
    """What this family needs of `agent.leaves.LeafManager`."""

    async def leaf(self, service: str) -> Leaf: ...

    def subscribe(self, callback: Callable[[str, Leaf], None]) -> Callable[[], None]: ...


class AgentConnectApi(StateFamily):
    """Identity of this agent's services."""

    def __init__(self, backend: Backend, datacenter: str, leaves: Leaves, *, default_allow: bool) -> None:
        super().__init__(backend, datacenter)
        self._leaves = leaves
        self._default_allow = default_allow

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/agent/connect/ca/roots", self._roots),
            Route("GET", "/v1/agent/connect/ca/leaf/:service", self._leaf),
            Route("POST", "/v1/agent/connect/authorize", self._authorize),
        )

    async def _roots(self, request: ApiRequest) -> ApiResponse:
        roots, result = await self._read(request, GetCaRoots())
        return result.response(ca_roots_shape(roots))

    async def _leaf(self, request: ApiRequest) -> ApiResponse:
        """Waits for a renewal while the leaf is no newer than the index that the caller knows."""
        request.check_datacenter(self._datacenter)
        service = request.capture("service", "Missing service name")
        options = request.read_options()
        until = trio.current_time() + options.wait_s
        renewed = trio.Event()

        def wake(name: str, leaf: Leaf) -> None:
            if name == service:
                renewed.set()

        unsubscribe = self._leaves.subscribe(wake)
        try:
            leaf = await self._leaves.leaf(service)
            while options.min_index > 0 and leaf.issued.modify_index <= options.min_index:
                if trio.current_time() >= until:
                    break
                with trio.move_on_at(until):
                    await renewed.wait()
                renewed = trio.Event()
                leaf = await self._leaves.leaf(service)
        finally:
            unsubscribe()
        return json_response(_leaf_shape(service, leaf), headers=index_header(leaf.issued.modify_index))

    async def _authorize(self, request: ApiRequest) -> ApiResponse:
        fields = Fields(request.json(), ("Target", "ClientCertURI", "ClientCertSerial"))
        target, uri = fields.text("Target"), fields.text("ClientCertURI")
        if not target:
            raise InvalidRequest("Target service must be specified")
        if not uri:
            raise InvalidRequest("ClientCertURI must be specified")
        try:
            identity = parse_spiffe_id(uri)
        except InvalidIdentity as error:
            raise InvalidRequest(f"ClientCertURI is invalid: {error}") from None
        source = identity.service
        if source is None:
            raise InvalidRequest("ClientCertURI is not the identity of a service")
        roots = (await self._backend.read(GetCaRoots(), ReadOptions())).value
        if identity.trust_domain != roots.trust_domain:
            reason = f"Identity from an external trust domain: {identity.trust_domain}"
            return json_response({"Authorized": False, "Reason": reason})
        intentions = (await self._backend.read(MatchIntentions("destination", target), ReadOptions())).value
        decision = authorize(intentions, source=source, destination=target, default_allow=self._default_allow)
        return json_response({"Authorized": decision.allowed, "Reason": decision.reason})


def _leaf_shape(service: str, leaf: Leaf) -> dict[str, object]:
    issued = leaf.issued
    return {
        "SerialNumber": issued.serial_number,
        "CertPEM": leaf.certificate_pem,
        "PrivateKeyPEM": leaf.private_key_pem,
        "Service": service,
        "ServiceURI": issued.spiffe_id,
        "ValidAfter": rfc3339(issued.valid_after_s),
        "ValidBefore": rfc3339(issued.valid_before_s),
        "CreateIndex": issued.create_index,
        "ModifyIndex": issued.modify_index,
    }
