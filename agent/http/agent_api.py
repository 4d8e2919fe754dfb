"""/v1/agent: what the agent is, the members it sees, joining and leaving, its metrics."""

import os
import platform
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from agent.addresses import join_address
from agent.config import AgentConfig
from agent.http.filtering import filtered
from agent.http.host_facts import host_facts
from agent.http.request import ApiRequest, ApiResponse, Route, empty_response, json_response, text_response
from agent.http.shapes import JsonObject
from agent.local_state import LocalState
from agent.runtime import Runtime
from agent.version import CONSUL_API_VERSION, VERSION
from mesh.errors import InvalidRequest, Refused
from mesh.gossip.members import Member
from mesh.model.catalog import Node

Statistics = Mapping[str, Mapping[str, str]]

_STATUS_NUMBERS = {"alive": 1, "leaving": 2, "left": 3, "failed": 4}
_PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUILD_DATE = "1970-01-01T00:00:01Z"  # Consul's own text for a build that carries no date
_HIDDEN = "hidden"


class Gossip(Protocol):
    """What this family needs of `agent.gossip_driver.GossipDriver`."""

    def members(self) -> tuple[Member, ...]: ...

    def local_member(self) -> Member: ...

    async def join(self, addresses: Sequence[str]) -> int: ...

    async def force_leave(self, name: str, *, prune: bool = False) -> bool: ...

    def statistics(self) -> dict[str, str]: ...


class MetricsView(Protocol):
    """What this family needs of `agent.telemetry.MergedMetrics`."""

    def json_form(self) -> dict[str, object]: ...

    async def exposition(self) -> str: ...


def member_shape(member: Member) -> JsonObject:
    """A row of /v1/agent/members."""
    return {
        "Name": member.name,
        "Addr": member.address,
        "Port": member.port,
        "Tags": dict(sorted(member.tags.items())),
        "Status": _STATUS_NUMBERS[member.status],
        "ProtocolMin": member.protocol_min,
        "ProtocolMax": member.protocol_max,
        "ProtocolCur": member.protocol_current,
        "DelegateMin": member.delegate_min,
        "DelegateMax": member.delegate_max,
        "DelegateCur": member.delegate_current,
    }


class AgentApi:
    """The agent itself. Everything here is local: it answers without a leader and without servers."""

    def __init__(
        self,
        config: AgentConfig,
        runtime: Runtime,
        *,
        node: Node,
        state: LocalState,
        gossip: Gossip,
        metrics: MetricsView,
        server_statistics: Callable[[], Statistics],
        request_leave: Callable[[], Awaitable[None]],
    ) -> None:
        """`server_statistics`: the sections `consul` and (on servers) `raft` of /v1/agent/self. `request_leave`
        leaves the cluster and returns when the others know; the agent stops once the caller has its answer."""
        self._config = config
        self._runtime = runtime
        self._node = node
        self._state = state
        self._gossip = gossip
        self._metrics = metrics
        self._server_statistics = server_statistics
        self._request_leave = request_leave

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/agent/self", self._self),
            Route("GET", "/v1/agent/version", self._version),
            Route("GET", "/v1/agent/host", self._host),
            Route("GET", "/v1/agent/metrics", self._show_metrics),
            Route("GET", "/v1/agent/members", self._members),
            Route("PUT", "/v1/agent/join/:address", self._join),
            Route("PUT", "/v1/agent/leave", self._leave),
            Route("PUT", "/v1/agent/force-leave/:node", self._force_leave),
        )

    # -- what the agent is

    async def _self(self, request: ApiRequest) -> ApiResponse:
        config = self._config
        return json_response(
            {
                "Config": {
                    "Datacenter": config.datacenter,
                    "PrimaryDatacenter": config.datacenter,
                    "NodeName": config.node_name,
                    "NodeID": self._node.node_id,
                    "Revision": f"mesh-{VERSION}",
                    "Server": config.server,
                    "Version": CONSUL_API_VERSION,
                    "BuildDate": _BUILD_DATE,
                    "BindAddr": config.bind_address,
                },
                "DebugConfig": self._debug_config(),
                "Coord": None,  # as in Consul where coordinates are off
                "Member": member_shape(self._gossip.local_member()),
                "Stats": self._statistics(),
                "Meta": dict(sorted(self._node.meta.items())),
                "xDS": None,
            }
        )

    def _debug_config(self) -> JsonObject:
        """The configuration under Consul's names, secrets hidden."""
        config = self._config
        lan = f"tcp://{join_address((config.advertise_address, config.ports.serf_lan))}"
        return {
            "AdvertiseAddrLAN": config.advertise_address,
            "BindAddr": config.bind_address,
            "Bootstrap": config.bootstrap_expect == 1,
            "BootstrapExpect": config.bootstrap_expect,
            "CheckUpdateInterval": f"{config.check_update_interval_s:g}s",
            "ClientAddrs": [config.client_address],
            "DNSPort": config.ports.dns,
            "DataDir": config.data_dir,
            "Datacenter": config.datacenter,
            "DefaultIntentionPolicy": config.default_intention_policy,
            "DevMode": config.dev_mode,
            "EncryptKey": _HIDDEN if config.gossip_key else "",
            "GRPCPort": config.ports.grpc,
            "HTTPMaxConnsPerClient": config.limits.http_max_conns_per_client,
            "HTTPPort": config.ports.http,
            "HTTPSPort": config.ports.https,
            "LeaveOnTerm": config.leave_on_terminate,
            "Logging": {"LogJSON": config.log_json, "LogLevel": config.log_level},
            "NodeID": self._node.node_id,
            "NodeMeta": dict(sorted(config.node_meta.items())),
            "NodeName": config.node_name,
            "RaftSnapshotThreshold": config.raft.snapshot_threshold,
            "RaftTrailingLogs": config.raft.trailing_logs,
            "RetryJoinIntervalLAN": f"{config.retry_interval_s:g}s",
            "RetryJoinLAN": list(config.retry_join),
            "SerfAdvertiseAddrLAN": lan,
            "SerfBindAddrLAN": f"tcp://{join_address((config.bind_address, config.ports.serf_lan))}",
            "SerfPortLAN": config.ports.serf_lan,
            "SerfPortWAN": config.ports.serf_wan,
            "ServerMode": config.server,
            "ServerPort": config.ports.server,
            "SkipLeaveOnInt": config.skip_leave_on_interrupt,
            "UIConfig": {"Enabled": config.ui},
        }

    def _statistics(self) -> dict[str, dict[str, str]]:
        services, checks = self._state.services(), self._state.checks()
        own: dict[str, dict[str, str]] = {
            "agent": {
                "check_monitors": "0",
                "check_ttls": str(sum(1 for check in checks if check.type == "ttl")),
                "checks": str(len(checks)),
                "services": str(len(services)),
            },
            "build": {"prerelease": "", "revision": f"mesh-{VERSION}", "version": CONSUL_API_VERSION},
            "runtime": {
                "arch": platform.machine(),
                "cpu_count": str(os.cpu_count() or 0),
                "os": platform.system().lower(),
                "version": f"python{platform.python_version()}",
            },
            "serf_lan": self._gossip.statistics(),
        }
        for section, values in self._server_statistics().items():
            own[section] = own.get(section, {}) | dict(values)
        return {section: dict(sorted(own[section].items())) for section in sorted(own)}

    async def _version(self, request: ApiRequest) -> ApiResponse:
        human = f"{CONSUL_API_VERSION}+mesh.{VERSION}"
        return json_response({"SHA": "", "BuildDate": _BUILD_DATE, "HumanVersion": human, "FIPS": ""})

    async def _host(self, request: ApiRequest) -> ApiResponse:
        return json_response(await host_facts(self._config.data_dir or "/", now_s=self._runtime.unix_time_s()))

    async def _show_metrics(self, request: ApiRequest) -> ApiResponse:
        if request.params.get("format") != "prometheus":
            return json_response(self._metrics.json_form())
        if self._config.telemetry.prometheus_retention_time_s <= 0:
            text = "Prometheus is not enabled since its retention time is not positive"
            return text_response(text, status=415)
        return ApiResponse(200, (await self._metrics.exposition()).encode(), _PROMETHEUS_TYPE)

    # -- members

    async def _members(self, request: ApiRequest) -> ApiResponse:
        _refuse_wan(request)
        if request.params.get("segment") not in ("", "_all"):
            raise InvalidRequest("Network segments are not supported; there is only the default one")
        rows = [member_shape(member) for member in self._gossip.members()]
        return json_response(filtered(request, rows, "member"))

    async def _join(self, request: ApiRequest) -> ApiResponse:
        _refuse_wan(request)
        await self._gossip.join([request.capture("address", "Missing address to join")])
        return empty_response()

    async def _leave(self, request: ApiRequest) -> ApiResponse:
        await self._request_leave()
        return empty_response()

    async def _force_leave(self, request: ApiRequest) -> ApiResponse:
        _refuse_wan(request)
        name = request.capture("node", "Missing node name")
        if not await self._gossip.force_leave(name, prune=request.params.flag("prune")):
            raise Refused(f"agent: No node found with name '{name}'")
        return empty_response()


def _refuse_wan(request: ApiRequest) -> None:
    if request.params.flag("wan"):
        raise InvalidRequest("This agent has no WAN pool: federation of datacenters is not supported yet")
