"""/v1/kv: the key/value store."""

from collections.abc import Sequence

from agent.backend import Backend
from agent.http.family import StateFamily
from agent.http.request import (
    BODY_BYTES_MAX,
    ApiRequest,
    ApiResponse,
    Route,
    json_response,
    require_applied,
)
from agent.http.shapes import kv_shape
from mesh.errors import InvalidRequest, Refused
from mesh.model.command import KvDelete, KvSet
from mesh.model.query import GetKv, ListKv, ListKvKeys

# A value is whatever someone stored: no browser may run it as a page of this agent.
_RAW_HEADERS = (("Content-Security-Policy", "sandbox"),)
_RAW_TYPE = "text/plain"


class KvApi(StateFamily):
    """Keys are byte-exact: decoded once from the path, never cleaned."""

    def __init__(
        self,
        backend: Backend,
        datacenter: str,
        *,
        value_bytes_max: int = BODY_BYTES_MAX,
        key_validation: bool = True,
    ) -> None:
        super().__init__(backend, datacenter)
        self._value_bytes_max = value_bytes_max  # limits.kv_max_value_size
        self._key_validation = key_validation  # not disable_kv_key_validation

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/kv/:key", self._get),
            Route("PUT", "/v1/kv/:key", self._put, body_bytes_max=self._value_bytes_max),
            Route("DELETE", "/v1/kv/:key", self._delete),
        )

    async def _get(self, request: ApiRequest) -> ApiResponse:
        params, key = request.params, request.captures["key"]
        if params.has("keys"):
            separator = params.get("separator") or params.get("seperator")  # Consul accepts the misspelling
            names, result = await self._read(request, ListKvKeys(prefix=key, separator=separator))
            headers = result.headers
            return json_response(list(names), headers=headers) if names else ApiResponse(404, headers=headers)
        if params.has("recurse"):
            rows, result = await self._read(request, ListKv(prefix=key))
            headers = result.headers
            shapes = [kv_shape(row) for row in rows]
            return json_response(shapes, headers=headers) if shapes else ApiResponse(404, headers=headers)
        _require_key(key)
        entry, result = await self._read(request, GetKv(key=key))
        headers = result.headers
        if entry is None:
            return ApiResponse(404, headers=headers)
        if params.has("raw"):
            return ApiResponse(200, entry.value, _RAW_TYPE, headers + _RAW_HEADERS)
        return json_response([kv_shape(entry)], headers=headers)

    async def _put(self, request: ApiRequest) -> ApiResponse:
        params, key = request.params, request.captures["key"]
        request.check_datacenter(self._datacenter)
        _require_key(key)
        _refuse_conflict(request, "cas", "acquire", "release")
        self._check_key(key)
        for name in ("acquire", "release"):
            if params.has(name):
                raise Refused(f'invalid session "{params.get(name)}"')
        command = KvSet(key=key, value=request.body, flags=params.unsigned("flags") or 0, cas_index=_cas_index(request))
        return json_response(require_applied(await self._backend.apply(command)))

    async def _delete(self, request: ApiRequest) -> ApiResponse:
        params, key = request.params, request.captures["key"]
        request.check_datacenter(self._datacenter)
        _refuse_conflict(request, "recurse", "cas")
        if params.has("recurse"):
            command = KvDelete(key=key, recurse=True)
        else:
            _require_key(key)
            command = KvDelete(key=key, cas_index=_cas_index(request))
        return json_response(require_applied(await self._backend.apply(command)))

    def _check_key(self, key: str) -> None:
        """Raises Refused for a key that some client or proxy on the way would not pass on as it is."""
        if not self._key_validation:
            return
        segments = key.removesuffix("/").split("/")
        if key.startswith("/"):
            reason = "it begins with a slash"
        elif any(segment in (".", "..") for segment in segments):
            reason = "it has a segment of dots"
        elif "" in segments:
            reason = "it has an empty segment"
        elif key != key.strip():
            reason = "it begins or ends with a space"
        else:
            return
        raise Refused(f"Invalid key name {key!r}: {reason}")


def _require_key(key: str) -> None:
    if not key:
        raise InvalidRequest("Missing key name")


def _refuse_conflict(request: ApiRequest, *names: str) -> None:
    given = [name for name in names if request.params.has(name)]
    if len(given) > 1:
        raise InvalidRequest("Conflicting flags: " + "&".join(f"{name}={request.params.get(name)}" for name in given))


def _cas_index(request: ApiRequest) -> int | None:
    if not request.params.has("cas"):
        return None
    index = request.params.unsigned("cas")
    if index is None:
        raise InvalidRequest("Invalid value for ?cas: '' is not an unsigned 64-bit number")
    return index
