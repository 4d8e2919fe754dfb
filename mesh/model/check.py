"""Health checks: a check's row in the catalog, and the definition an agent runs."""

from typing import Literal

import msgspec

from mesh.model.catalog import Node, Service

CheckStatus = Literal["passing", "warning", "critical"]

SERF_HEALTH_ID = "serfHealth"
SERF_HEALTH_NAME = "Serf Health Status"
NODE_MAINTENANCE_ID = "_node_maintenance"
SERVICE_MAINTENANCE_PREFIX = "_service_maintenance:"


class CheckDefinition(msgspec.Struct, frozen=True):
    """How an agent runs a check. Exactly one of `http`, `tcp`, `ttl_s`, `alias_*` decides the type. Times: seconds."""

    name: str = ""
    check_id: str = ""
    service_id: str = ""
    notes: str = ""
    status: CheckStatus | Literal[""] = ""  # initial; empty means critical
    http: str = ""
    method: str = ""  # empty: GET
    header: dict[str, tuple[str, ...]] = {}
    body: str = ""
    disable_redirects: bool = False
    tls_server_name: str = ""
    tls_skip_verify: bool = False
    tcp: str = ""  # host:port
    ttl_s: float = 0.0
    alias_node: str = ""
    alias_service: str = ""
    interval_s: float = 0.0
    timeout_s: float = 0.0  # 0: 10 s
    success_before_passing: int = 0
    failures_before_warning: int = 0
    failures_before_critical: int = 0
    deregister_critical_service_after_s: float = 0.0
    output_bytes_max: int = 0  # 0: 4096

    @property
    def type(self) -> str:
        """`http`, `tcp`, `ttl`, `alias`, or empty when nothing runs it (a bare status row)."""
        if self.http:
            return "http"
        if self.tcp:
            return "tcp"
        if self.ttl_s:
            return "ttl"
        if self.alias_node or self.alias_service:
            return "alias"
        return ""


class Check(msgspec.Struct, frozen=True):
    """A check's row: node-level when `service_id` is empty."""

    node: str
    check_id: str
    name: str
    status: CheckStatus = "critical"
    notes: str = ""
    output: str = ""
    service_id: str = ""
    service_name: str = ""
    service_tags: tuple[str, ...] = ()
    type: str = ""
    interval: str = ""  # as the user wrote it, e.g. "10s"
    timeout: str = ""
    exposed_port: int = 0
    definition: CheckDefinition | None = None
    create_index: int = 0
    modify_index: int = 0


class ServiceHealth(msgspec.Struct, frozen=True):
    """A service instance with its node and every check that bears on it: a row of `/v1/health/service/:service`."""

    node: Node
    service: Service
    checks: tuple[Check, ...]

    @property
    def status(self) -> CheckStatus:
        """The worst of its checks."""
        statuses = {check.status for check in self.checks}
        return "critical" if "critical" in statuses else "warning" if "warning" in statuses else "passing"
