"""/v1/connect/ca/roots: what whoever verifies identities must trust."""

from collections.abc import Sequence

from agent.http.family import StateFamily
from agent.http.request import ApiRequest, ApiResponse, Route
from agent.http.shapes import ca_roots_shape
from mesh.model.query import GetCaRoots

_PEM_TYPE = "application/pem-certificate-chain"  # RFC 8555 section 9.1


class ConnectCaApi(StateFamily):
    """Trust roots, without private keys."""

    def routes(self) -> Sequence[Route]:
        return (Route("GET", "/v1/connect/ca/roots", self._roots),)

    async def _roots(self, request: ApiRequest) -> ApiResponse:
        as_pem = request.params.flag("pem")
        roots, result = await self._read(request, GetCaRoots())
        if not as_pem:
            return result.response(ca_roots_shape(roots))
        pem = "".join(
            part if part.endswith("\n") else part + "\n"
            for root in roots.roots
            for part in (root.root_cert_pem, *root.intermediate_certs_pem)
        )
        return ApiResponse(200, pem.encode(), _PEM_TYPE, result.headers)
