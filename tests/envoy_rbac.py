"""Intentions compiled to Envoy's RBAC, as Consul's control plane does it, and a real Envoy that decides by them.

Many rule sets share one Envoy: a route per set, chosen by a header, each with RBAC of its own. Who calls is a header,
too: principals that match certificates would decide the same.
"""

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path

from envoy_peer import HTTP, LIMIT_S, endpoint
from policy_cases import SERVICE, Case

from mesh.model.intention import Intention

_RBAC = f"{HTTP}.http.rbac.v3.RBAC"
_SOURCE, _SET = "x-rbac-source", "x-rbac-set"


def rbac_of(intentions: Sequence[Intention], *, default_allow: bool) -> dict:
    """The rules whose effect differs from the default, each without what a rule before it has decided."""
    rules = [one for one in intentions if one.destination in (SERVICE, "*")]
    rules.sort(key=lambda one: -one.precedence)
    first: dict[str, Intention] = {}
    for rule in rules:  # of equal sources the one of higher precedence is the only one
        first.setdefault(rule.source, rule)
    kept = "deny" if default_allow else "allow"
    policies = {}
    decided: list[dict] = []
    for number, rule in enumerate(first.values()):
        principal = _all([_principal(rule.source), *({"not_id": one} for one in decided)], "and_ids", "ids")
        permissions = _permissions(rule, kept) if rule.permissions else [{"any": True}] * (rule.action == kept)
        if permissions:
            policies[str(number)] = {"principals": [principal], "permissions": permissions}
        decided.append(_principal(rule.source))
    return {"action": "DENY" if default_allow else "ALLOW", "policies": policies}


def _all(parts: list[dict], key: str, inner: str) -> dict:
    return parts[0] if len(parts) == 1 else {key: {inner: parts}}


def _principal(source: str) -> dict:
    if source == "*":
        return {"any": True}
    return {"header": {"name": _SOURCE, "string_match": {"exact": source}}}


def _permissions(rule: Intention, kept: str) -> list[dict]:
    found, before = [], []
    for permission in rule.permissions:
        condition = _condition(permission["HTTP"])
        if permission["Action"] == kept:
            found.append(_all([condition, *({"not_rule": one} for one in before)], "and_rules", "rules"))
        before.append(condition)
    return found


def _condition(http: dict) -> dict:
    parts = []
    for field, kind in (("PathExact", "exact"), ("PathPrefix", "prefix")):
        if field in http:
            parts.append({"url_path": {"path": {kind: http[field].replace("%61", "a")}}})
    if "PathRegex" in http:
        parts.append({"url_path": {"path": {"safe_regex": {"regex": http["PathRegex"]}}}})
    parts.extend({"header": _header(one)} for one in http.get("Header", ()))
    if "Methods" in http:
        methods = [{"header": {"name": ":method", "string_match": {"exact": one}}} for one in http["Methods"]]
        parts.append(_all(methods, "or_rules", "rules"))
    return _all(parts, "and_rules", "rules")


def _header(wanted: dict) -> dict:
    matcher: dict = {"name": wanted["Name"], "invert_match": wanted.get("Invert", False)}
    if wanted.get("Present"):
        return {**matcher, "present_match": True}
    for field, kind in (("Exact", "exact"), ("Prefix", "prefix"), ("Suffix", "suffix"), ("Contains", "contains")):
        if field in wanted:
            return {**matcher, "string_match": {kind: wanted[field], "ignore_case": wanted.get("IgnoreCase", False)}}
    return {**matcher, "string_match": {"safe_regex": {"regex": wanted["Regex"]}}}


class EnvoyPolicies:
    """A running Envoy with one RBAC per rule set and default."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)

    def close(self) -> None:
        self._connection.close()

    def allows(self, number: int, case: Case) -> bool:
        """Envoy's verdict on the case, under set `number` of those it was started with."""
        self._connection.putrequest(case.method, case.head.target.decode(), skip_host=True, skip_accept_encoding=True)
        for name, value in (("host", "api.example"), (_SOURCE, case.source), (_SET, str(number)), *case.headers):
            self._connection.putheader(name, value)
        self._connection.endheaders()
        response = self._connection.getresponse()
        response.read()
        assert response.status in (200, 403), response.status
        return response.status == 200


def _configuration(port: int, sets: Sequence[tuple[Sequence[Intention], bool]]) -> dict:
    routes = [
        {
            "match": {"prefix": "/", "headers": [{"name": _SET, "string_match": {"exact": str(number)}}]},
            "direct_response": {"status": 200},
            "typed_per_filter_config": {
                "envoy.filters.http.rbac": {
                    "@type": f"{_RBAC}PerRoute",
                    "rbac": {"rules": rbac_of(intentions, default_allow=default_allow)},
                }
            },
        }
        for number, (intentions, default_allow) in enumerate(sets)
    ]
    manager = {
        "@type": f"{HTTP}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "normalize_path": True,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [
            {"name": "envoy.filters.http.rbac", "typed_config": {"@type": _RBAC}},
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{HTTP}.http.router.v3.Router"}},
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {
        "static_resources": {"listeners": [{"name": "in", **endpoint(port), "filter_chains": [{"filters": filters}]}]}
    }


@contextlib.contextmanager
def envoy_policies(
    directory: Path, sets: Sequence[tuple[Sequence[Intention], bool]], *, binary: str = "envoy"
) -> Iterator[EnvoyPolicies]:
    """An Envoy that knows these rule sets, each with its default; the process ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = directory / "envoy-rbac.json"
    path.write_text(json.dumps(_configuration(port, sets)))
    with (directory / "envoy-rbac.log").open("wb") as log:
        command = [binary, "-c", str(path), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            assert process.poll() is None, (directory / "envoy-rbac.log").read_text()
            assert time.monotonic() < deadline, "Envoy did not begin to listen"
            time.sleep(0.05)
        with contextlib.closing(EnvoyPolicies(port)) as policies:
            yield policies
    finally:
        process.kill()
        process.wait()
