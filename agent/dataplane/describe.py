"""A worker's answer to what it holds, read from its tables as they are at this moment."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from agent.dataplane.endpoint import Endpoint
from agent.dataplane.metrics import ListenerMetrics
from agent.dataplane.target import Target
from mesh.proxy.description import (
    ENDPOINTS_DESCRIBED_MAX,
    CertificateDescription,
    Description,
    EndpointDescription,
    ListenerDescription,
    Refusal,
    RouteDescription,
    TargetDescription,
    described_routes,
)
from mesh.proxy.resources import ServedListener
from mesh.proxy.sidecar_config import InboundListener, SidecarConfig, TargetConfig


class Served(NamedTuple):
    """One listener: its configuration, its accounts, and where its requests or connections can go."""

    item: ServedListener
    metrics: ListenerMetrics
    targets: tuple[Target, ...]


def describe(
    served: Iterable[Served], *, service: str, pid: int, version: int, refused: Refusal | None, now: float
) -> Description:
    """Everything about the sidecars of `service` (or with that proxy ID; empty: of all). `now` is the reactor's."""
    chosen = [one for one in served if service in ("", one.item.sidecar.service, one.item.sidecar.proxy_id)]
    sidecars = {item.sidecar.proxy_id: item.sidecar for item, _, _ in chosen}
    endpoints: list[EndpointDescription] = []
    for item, _, targets in chosen:
        for target in targets:
            room = ENDPOINTS_DESCRIBED_MAX - len(endpoints)
            endpoints.extend(_endpoint(item, target, endpoint, now) for endpoint in target.endpoints[:room])
    return Description(
        pid=pid,
        version=version,
        refused=refused,
        listeners=tuple(_listener(item, metrics) for item, metrics, _ in chosen),
        routes=tuple(route for item, _, _ in chosen if item.listener.protocol == "http" for route in _routes(item)),
        targets=tuple(_target(item, target) for item, _, targets in chosen for target in targets),
        endpoints=tuple(endpoints),
        certificates=tuple(row for sidecar in sidecars.values() for row in _certificates(sidecar)),
    )


def _shown_listener(item: ServedListener) -> str:
    return f"{item.key.address}:{item.key.port}"


def _default_target(item: ServedListener) -> str:
    listener = item.listener
    return "local_app" if isinstance(listener, InboundListener) else listener.target.name


def _listener(item: ServedListener, metrics: ListenerMetrics) -> ListenerDescription:
    listener = item.listener
    inbound = listener if isinstance(listener, InboundListener) else None
    return ListenerDescription(
        proxy_id=item.sidecar.proxy_id,
        service=item.sidecar.service,
        direction="inbound" if inbound is not None else "outbound",
        address=listener.bind_address,
        port=listener.bind_port,
        protocol=listener.protocol,
        target=_default_target(item),
        hosts=len(listener.routes.hosts),
        rules=sum(len(host.rules) for host in listener.routes.hosts),
        mtls=inbound.mtls if inbound is not None else "",
        intentions=len(inbound.intentions) if inbound is not None else 0,
        default_allow=inbound is None or inbound.default_allow,
        connections_max=listener.connections_max,
        connections=metrics.active,
        requests=metrics.requests if listener.protocol == "http" else metrics.connections,
        denied=metrics.denied,
        access_log=item.sidecar.access_log.path,
    )


def _routes(item: ServedListener) -> Iterable[RouteDescription]:
    return described_routes(
        item.listener.routes,
        proxy_id=item.sidecar.proxy_id,
        listener=_shown_listener(item),
        target=_default_target(item),
    )


def _policies(config: TargetConfig) -> Iterator[str]:
    if config.outlier is not None:
        yield "outlier detection"
    if config.probation is not None:
        yield "probation"
    if config.retry is not None:
        yield f"retries {config.retry.retries}"
    if config.retry_budget is not None:
        yield f"retry budget ({config.retry_budget.kind})"
    if config.subset:
        yield "subset " + ",".join(f"{key}={value}" for key, value in config.subset)
    if config.plain:
        yield "plain"


def _target(item: ServedListener, target: Target) -> TargetDescription:
    endpoints, breaker, config = target.endpoints, target.breaker, target.config
    return TargetDescription(
        proxy_id=item.sidecar.proxy_id,
        listener=_shown_listener(item),
        target=target.name,
        spiffe_ids=config.expected_spiffe_ids,
        balancer=config.load_balancing.kind,
        endpoints=len(endpoints),
        usable=sum(endpoint.usable for endpoint in endpoints),
        ejected=sum(endpoint.record is not None and endpoint.record.ejected for endpoint in endpoints),
        requests=breaker.requests,
        pending=breaker.pending,
        retries=breaker.retries,
        connections=breaker.connections,
        requests_max=breaker.requests_max,
        pending_max=breaker.pending_max,
        connections_max=breaker.connections_max,
        policies=tuple(_policies(config)),
    )


def _state(endpoint: Endpoint) -> str:
    if not endpoint.healthy:
        return "unhealthy"
    if endpoint.record is not None and endpoint.record.ejected:
        return "ejected"
    if endpoint.gate is not None and endpoint.gate.state != "open":
        return endpoint.gate.state
    return "healthy"


def _endpoint(item: ServedListener, target: Target, endpoint: Endpoint, now: float) -> EndpointDescription:
    record, pool = endpoint.record, endpoint.pool
    return EndpointDescription(
        proxy_id=item.sidecar.proxy_id,
        listener=_shown_listener(item),
        target=target.name,
        endpoint=endpoint.id,
        address=endpoint.host,
        state=_state(endpoint),
        weight=endpoint.weight,
        priority=endpoint.priority,
        locality=endpoint.locality,
        active=endpoint.active,
        connections=pool.opened,
        idle=len(pool.idle),
        waiting=pool.waiting,
        ejections=record.ejections if record is not None else 0,
        ejection=(record.reason or "") if record is not None else "",
        ejected_s=now - record.ejected_at if record is not None and record.ejected else 0.0,
    )


def _certificates(sidecar: SidecarConfig) -> Iterator[CertificateDescription]:
    chain = x509.load_pem_x509_certificates(sidecar.certificate_chain_pem.encode())
    for number, certificate in enumerate(chain):
        yield _certificate(sidecar, "intermediate" if number else "leaf", certificate)
    for pem in sidecar.trust_roots_pem:
        for certificate in x509.load_pem_x509_certificates(pem.encode()):
            yield _certificate(sidecar, "root", certificate)


def _certificate(sidecar: SidecarConfig, kind: str, certificate: x509.Certificate) -> CertificateDescription:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        uris = []
    digits = f"{certificate.serial_number:x}"
    digits = digits.zfill(len(digits) + len(digits) % 2)
    return CertificateDescription(
        proxy_id=sidecar.proxy_id,
        service=sidecar.service,
        kind=kind,
        subject=certificate.subject.rfc4514_string(),
        spiffe_id=uris[0] if uris else "",
        serial_number=":".join(digits[at : at + 2] for at in range(0, len(digits), 2)),
        valid_after_s=certificate.not_valid_before_utc.timestamp(),
        valid_before_s=certificate.not_valid_after_utc.timestamp(),
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
    )
