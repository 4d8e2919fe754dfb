"""Who is at the other end of a finished handshake, for one sidecar."""

import ssl
import time
from collections import OrderedDict

from agent.tls import client_context, peer_chain_der, server_context
from mesh.ca.svid import Svid, check_chain_size, read_svid
from mesh.errors import InvalidIdentity
from mesh.proxy.client_cert import ClientCert, describe
from mesh.proxy.sidecar_config import SidecarConfig

IDENTITIES_MAX = 1024  # certificates whose content has been judged, per sidecar


class SidecarIdentity:
    """The TLS contexts of one leaf and trust bundle, and the judgement of peers' certificates under it.

    Raises ConfigError when the material cannot be used.
    """

    def __init__(self, sidecar: SidecarConfig) -> None:
        material = sidecar.certificate_chain_pem, sidecar.private_key_pem, sidecar.trust_roots_pem
        self.server = server_context(*material)
        self.client = client_context(*material)
        self.service = sidecar.service
        self.spiffe_id = sidecar.spiffe_id
        self._trust_domain = sidecar.trust_domain
        # What a certificate says does not change: only its dates are looked at again. Handshakes are what a flood of
        # short connections costs, and parsing is a good part of one.
        self._judged: OrderedDict[tuple[bytes, str], Svid] = OrderedDict()

    def server_spiffe_id(self, tls: ssl.SSLObject) -> str:
        """The server's SPIFFE ID. Raises InvalidIdentity."""
        return str(self._identify(tls, is_client=False).spiffe_id)

    def client_svid(self, tls: ssl.SSLObject) -> Svid:
        """The client's SPIFFE ID, and until when it proves anything. Raises InvalidIdentity."""
        return self._identify(tls, is_client=True)

    def client_cert(self, tls: ssl.SSLObject) -> ClientCert:
        """What the client's certificate says, for the application. Requires that `client_svid` accepted it."""
        der = tls.getpeercert(binary_form=True)
        assert der is not None, "a client without a certificate has been refused"
        return describe(der)

    def _identify(self, tls: ssl.SSLObject, *, is_client: bool) -> Svid:
        role = "client" if is_client else "server"
        check_chain_size(peer_chain_der(tls))
        leaf = tls.getpeercert(binary_form=True)
        if leaf is None:
            raise InvalidIdentity(f"the {role} presented no certificate")
        key = (leaf, role)
        svid = self._judged.get(key)
        if svid is None:
            svid = read_svid(leaf, trust_domain=self._trust_domain, role="client" if is_client else "server")
            self._judged[key] = svid
            if len(self._judged) > IDENTITIES_MAX:
                self._judged.popitem(last=False)
        svid.check_time(time.time())
        return svid
