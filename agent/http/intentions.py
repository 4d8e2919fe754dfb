"""/v1/connect/intentions: who may call whom."""

from collections.abc import Sequence
from typing import cast

import trio

from agent.backend import Backend
from agent.http.config_fields import canonical_fields
from agent.http.family import ReadResult, StateFamily
from agent.http.filtering import filtered
from agent.http.permission_check import check_permissions
from agent.http.request import ApiRequest, ApiResponse, Route, empty_response, json_response, require_applied
from agent.http.shapes import intention_shape
from agent.runtime import Runtime
from agent.strict_json import Fields
from mesh.authz import authorize
from mesh.errors import InvalidRequest, NotFound, Refused
from mesh.model.command import IntentionDelete, IntentionUpsert
from mesh.model.intention import Intention, IntentionAction
from mesh.model.query import Answer, GetIntention, ListIntentions, MatchIntentions, ReadOptions
from mesh.state.validation import require_intention

NAMES_MAX = 128  # in one match request: a gateway asks for many services at once

_FIELDS = (
    "ID", "Description", "SourceNS", "SourceName", "DestinationNS", "DestinationName", "SourcePartition",
    "DestinationPartition", "SourcePeer", "SourceSamenessGroup", "SourceType", "Action", "Permissions", "JWT",
    "DefaultAddr", "DefaultPort", "Meta", "Precedence", "CreatedAt", "UpdatedAt", "Hash", "CreateIndex", "ModifyIndex",
)  # fmt: skip


class IntentionsApi(StateFamily):
    """Rules by source and destination; the endpoints by ID are the deprecated ones."""

    def __init__(self, backend: Backend, datacenter: str, runtime: Runtime, *, default_allow: bool = True) -> None:
        super().__init__(backend, datacenter)
        self._runtime = runtime
        self._default_allow = default_allow

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/connect/intentions", self._list),
            Route("POST", "/v1/connect/intentions", self._create),
            Route("GET", "/v1/connect/intentions/exact", self._get_exact),
            Route("PUT", "/v1/connect/intentions/exact", self._put_exact),
            Route("DELETE", "/v1/connect/intentions/exact", self._delete_exact),
            Route("GET", "/v1/connect/intentions/match", self._match),
            Route("GET", "/v1/connect/intentions/check", self._check),
            Route("GET", "/v1/connect/intentions/:id", self._get_by_id),
            Route("PUT", "/v1/connect/intentions/:id", self._put_by_id),
            Route("DELETE", "/v1/connect/intentions/:id", self._delete_by_id),
        )

    async def _list(self, request: ApiRequest) -> ApiResponse:
        rows, result = await self._read(request, ListIntentions())
        return result.response(filtered(request, [intention_shape(row) for row in rows], "intention"))

    async def _get_exact(self, request: ApiRequest) -> ApiResponse:
        source, destination = _pair(request)
        intention, result = await self._read(request, GetIntention(source, destination))
        if intention is None:
            raise NotFound("Intention not found")
        return result.response(intention_shape(intention))

    async def _put_exact(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        source, destination = _pair(request)
        return json_response(await self._upsert(self._intention(Fields(request.json(), _FIELDS), source, destination)))

    async def _delete_exact(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        source, destination = _pair(request)
        return json_response(require_applied(await self._backend.apply(IntentionDelete(source, destination))))

    async def _check(self, request: ApiRequest) -> ApiResponse:
        source, destination = _pair(request)
        _check_source_type(request.params.get("source-type"))
        rules, result = await self._read(request, MatchIntentions("destination", destination))
        decision = authorize(rules, source=source, destination=destination, default_allow=self._default_allow)
        return result.response({"Allowed": decision.allowed})

    async def _match(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        by, names = request.params.get("by"), request.params.all("name")
        if not by:
            raise Refused("required query parameter 'by' not set")
        if by not in ("source", "destination"):
            raise Refused("'by' parameter must be one of 'source' or 'destination'")
        if not any(names):
            raise Refused("required query parameter 'name' not set")
        if len(names) > NAMES_MAX:
            raise InvalidRequest(f"more than {NAMES_MAX} names in one request")
        options = request.read_options()
        queries = {
            name: MatchIntentions("source" if by == "source" else "destination", _local_name(name)) for name in names
        }
        answers = await self._match_all(queries, options)
        meta = max((answer.meta for answer in answers.values()), key=lambda one: one.index)
        value = {name: [intention_shape(rule) for rule in answer.value] for name, answer in answers.items()}
        return ReadResult(meta, options).response(value)

    async def _match_all(
        self, queries: dict[str, MatchIntentions], options: ReadOptions
    ) -> dict[str, Answer[tuple[Intention, ...]]]:
        """Every answer; a blocking read ends with the first name whose rules change."""
        if options.min_index and len(queries) > 1:
            async with trio.open_nursery() as nursery:

                async def wait(query: MatchIntentions) -> None:
                    await self._backend.read(query, options)
                    nursery.cancel_scope.cancel()

                for query in queries.values():
                    nursery.start_soon(wait, query)
            options = ReadOptions(consistency=options.consistency, max_stale_s=options.max_stale_s)
        return {name: await self._backend.read(query, options) for name, query in queries.items()}

    # The deprecated endpoints

    async def _create(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        fields = Fields(request.json(), _FIELDS)
        if fields.text("ID"):
            raise InvalidRequest("ID must be empty when creating a new intention")
        source, destination = fields.text("SourceName"), fields.text("DestinationName")
        existing = await self._backend.read(GetIntention(source, destination), ReadOptions())
        if existing.value is not None:
            raise Refused(f"duplicate intention found: the rule of {source!r} to {destination!r} exists already")
        intention_id = self._runtime.new_uuid()
        await self._upsert(self._intention(fields, source, destination, intention_id))
        return json_response({"ID": intention_id})

    async def _get_by_id(self, request: ApiRequest) -> ApiResponse:
        rows, result = await self._read(request, ListIntentions())
        return result.response(intention_shape(_with_id(rows, request.captures["id"])))

    async def _put_by_id(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        fields = Fields(request.json(), _FIELDS)
        rows = await self._backend.read(ListIntentions(), ReadOptions())
        old = _with_id(rows.value, request.captures["id"])
        source, destination = fields.text("SourceName"), fields.text("DestinationName")
        if source not in ("", old.source) or destination not in ("", old.destination):
            raise Refused("Cannot modify the source or destination of an intention; create another one")
        await self._upsert(self._intention(fields, old.source, old.destination, old.intention_id))
        return json_response({"ID": old.intention_id})

    async def _delete_by_id(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        rows = await self._backend.read(ListIntentions(), ReadOptions())
        old = _with_id(rows.value, request.captures["id"])
        require_applied(await self._backend.apply(IntentionDelete(old.source, old.destination)))
        return empty_response()

    async def _upsert(self, intention: Intention) -> bool:
        require_intention(intention)
        await check_permissions(self._backend, (intention,))
        return require_applied(await self._backend.apply(IntentionUpsert(intention)))

    def _intention(self, fields: Fields, source: str, destination: str, intention_id: str = "") -> Intention:
        """The rule that a body describes, for the pair that it is about."""
        for name in ("SourceNS", "DestinationNS", "SourcePartition", "DestinationPartition"):
            if fields.text(name) not in ("", "default"):
                raise InvalidRequest(f"{name} {fields.text(name)!r}: there is only the default one")
        for name in ("SourcePeer", "SourceSamenessGroup"):
            if fields.text(name):
                raise InvalidRequest(f"{name} is not supported: this cluster has no peers")
        if fields.mapping("JWT"):
            raise InvalidRequest("JWT of an intention is not supported")
        _check_source_type(fields.text("SourceType"))
        action = fields.text("Action")
        if action not in ("", "allow", "deny"):
            raise Refused("Action must be set to 'allow' or 'deny'")
        permissions = tuple(canonical_fields(item) for item in fields.items("Permissions"))
        if not all(isinstance(permission, dict) for permission in permissions):
            raise InvalidRequest("Permissions must be a list of objects")
        now_s = self._runtime.unix_time_s()
        return Intention(
            source=source,
            destination=destination,
            action=cast(IntentionAction, action) if action else None,
            permissions=cast(tuple[dict[str, object], ...], permissions),
            intention_id=intention_id,
            description=fields.text("Description"),
            meta=fields.text_map("Meta"),
            created_at_s=now_s,
            updated_at_s=now_s,
        )


def _pair(request: ApiRequest) -> tuple[str, str]:
    names: list[str] = []
    for name in ("source", "destination"):
        value = request.params.get(name)
        if not value:
            raise Refused(f"required query parameter '{name}' not set")
        names.append(_local_name(value))
    return names[0], names[1]


def _local_name(text: str) -> str:
    """The service of `name`, `namespace/name` or `partition/namespace/name`. Raises InvalidRequest for foreign ones."""
    *tenancy, name = text.split("/")
    if len(tenancy) > 2 or any(part != "default" for part in tenancy):
        raise InvalidRequest(f"{text!r}: there is only the default namespace")
    return name


def _check_source_type(source_type: str) -> None:
    if source_type not in ("", "consul"):
        raise Refused("SourceType must be set to 'consul'")


def _with_id(rows: Sequence[Intention], intention_id: str) -> Intention:
    for row in rows:
        if intention_id and row.intention_id == intention_id:
            return row
    raise NotFound("Intention not found")
