"""What a worker serves at the moment, and the way from one configuration to the next: all of it, or none."""

import os
import random
import socket
from collections.abc import Iterator, Mapping
from functools import partial

from agent.dataplane.access_log import AccessLogs, surroundings
from agent.dataplane.describe import Served, describe
from agent.dataplane.http_service import HttpService
from agent.dataplane.identity import SidecarIdentity
from agent.dataplane.inbound import InboundHttp, InboundTcp
from agent.dataplane.listener import Listener, ReservedDescriptor
from agent.dataplane.metrics import ListenerMetrics, Sample, TargetMetrics
from agent.dataplane.names import Names
from agent.dataplane.outbound import OutboundHttp, OutboundTcp
from agent.dataplane.reactor import Reactor
from agent.dataplane.taps import Taps
from agent.dataplane.target import Target
from agent.dataplane.tracing import Tracer
from mesh.authz.observed import ObservedListener
from mesh.errors import ConfigError
from mesh.proxy.description import Description, Refusal
from mesh.proxy.resources import ListenerKey, ServedListener, changes, listeners
from mesh.proxy.sidecar_config import InboundListener, SidecarConfig, TargetConfig, WorkerConfig, check
from mesh.proxy.trace_context import TraceForm

SPANS_TIMEOUT_S = 2.0  # for the last spans, when the worker ends
DEPARTED_IDLE_S = 5.0  # of connections to a listener that left the configuration: their next request is their last
DEPARTED_TIMEOUT_S = 600.0  # after it, policy no longer reaches those that are still open; Envoy's drain time

Service = InboundHttp | InboundTcp | OutboundHttp | OutboundTcp

_Identities = dict[tuple[str, str, tuple[str, ...], str], SidecarIdentity]


def _listener_labels(served: ServedListener) -> dict[str, str]:
    sidecar, listener = served.sidecar, served.listener
    labels = {
        "local_cluster": sidecar.service,
        "consul_source_service": sidecar.service,
        "consul_source_datacenter": sidecar.datacenter,
        "consul_source_namespace": "default",
        "envoy_listener_address": f"{listener.bind_address}_{listener.bind_port}",
        "direction": "inbound" if isinstance(listener, InboundListener) else "outbound",
    }
    if not isinstance(listener, InboundListener):
        labels["upstream"] = listener.target.name
    return labels


def _target_labels(sidecar: SidecarConfig, target: TargetConfig | None) -> dict[str, str]:
    """`target` None: the local application."""
    labels = {
        "local_cluster": sidecar.service,
        "consul_source_service": sidecar.service,
        "consul_source_datacenter": sidecar.datacenter,
        "consul_source_namespace": "default",
    }
    if target is None:
        return {**labels, "envoy_cluster_name": "local_app"}
    return {
        **labels,
        "envoy_cluster_name": target.name,
        "consul_destination_service": target.service or target.name,
        "consul_destination_target": target.name,
        "consul_destination_datacenter": target.datacenter or sidecar.datacenter,
        "consul_upstream_service": target.service or target.name,
    }


class Tables:
    """Listeners by address, services by what they are, identities by their material."""

    def __init__(self, reactor: Reactor, rng: random.Random, *, tracing_endpoint: str = "") -> None:
        """`tracing_endpoint` is used when the configuration names none."""
        self.config = WorkerConfig(version=-1)
        self.names = Names()  # its `run` is the owner's to start
        self._reactor = reactor
        self._rng = rng
        self._reserved = ReservedDescriptor()
        self._listeners: dict[ListenerKey, Listener] = {}
        self._adopted: dict[ListenerKey, socket.socket] = {}  # for listeners of the configuration to come
        self._services: dict[tuple[str, str, str, str, int], Service] = {}
        self._drained: list[Service] = []  # of former configurations, with connections still open
        self._identities: _Identities = {}
        self._logs = AccessLogs(reactor.time, surroundings())
        self._tracing: tuple[str, float, TraceForm] = "", 0.0, "w3c"
        self._default_tracing_endpoint = tracing_endpoint
        self._tracer = Tracer(rng)
        self.taps = Taps(reactor.time, self._http_services)

    # ---- configuration

    def apply(self, config: WorkerConfig) -> None:
        """Serves a configuration. Raises ConfigError, with everything as it was, when it cannot."""
        check(config)
        change = changes(self.config, config)
        identities = self._make_identities(config)
        bound: list[Listener] = []
        logs = self._logs.prepare(
            (sidecar.access_log for sidecar in config.sidecars),
            otlp_endpoint=self._otlp_endpoint_of(config),
        )
        try:
            # A listener that is already bound (left over from a NACK, say) is never bound twice.
            for key in change.opened:
                bound.append(Listener(self._reactor, key, self._reserved, self._adopted.pop(key, None)))
            former_tracer = self._replace_tracer(config)
        except ConfigError:
            for listener in bound:
                listener.close()
            self._logs.abandon(logs)
            self._drop_adopted()
            raise
        self._drop_adopted()
        # Nothing below can fail.
        self._logs.commit(logs)
        self._identities = identities
        self._listeners.update((listener.key, listener) for listener in bound)
        for key in change.closed:
            self._listeners.pop(key).close()
        self.names.want(_dialed_addresses(config))
        self._swap(change.served)
        self.config = config
        if former_tracer is not None:
            former_tracer.shutdown()

    @property
    def otlp_endpoint(self) -> str:
        """The collector of this configuration's telemetry; empty: there is none."""
        return self._otlp_endpoint_of(self.config)

    def _otlp_endpoint_of(self, config: WorkerConfig) -> str:
        return config.tracing_endpoint or self._default_tracing_endpoint

    def _replace_tracer(self, config: WorkerConfig) -> Tracer | None:
        """The tracer until now, when the configuration asks for another one. Raises ConfigError."""
        tracing = self._otlp_endpoint_of(config), config.trace_sampling, config.trace_form
        if tracing == self._tracing:
            return None
        try:
            tracer = Tracer(self._rng, endpoint=tracing[0], sampling=tracing[1], form=tracing[2])
        except Exception as error:  # the SDK documents none of its own
            raise ConfigError(f"spans cannot be exported to {tracing[0]}: {error!r}") from error
        former, self._tracer, self._tracing = self._tracer, tracer, tracing
        return former

    def _make_identities(self, config: WorkerConfig) -> _Identities:
        made: _Identities = {}
        for sidecar in config.sidecars:
            key = _identity_key(sidecar)
            if key in made:
                continue
            try:
                made[key] = self._identities.get(key) or SidecarIdentity(sidecar)
            except ConfigError as error:
                raise ConfigError(f"sidecar {sidecar.proxy_id}: {error}") from error
        return made

    def _swap(self, served: tuple[ServedListener, ...]) -> None:
        before = self._services
        self._services = {}
        for item in served:
            service = before.pop(item.service_key, None) or self._new_service(item)
            identity = self._identities[_identity_key(item.sidecar)]
            match service, item.listener:
                case InboundHttp() | InboundTcp(), InboundListener() as listener:
                    service.update(listener, identity)
                case OutboundHttp() | OutboundTcp(), listener if not isinstance(listener, InboundListener):
                    service.update(listener, identity, item.sidecar)
                case _:
                    raise AssertionError("a service's kind is part of its key")
            if isinstance(service, InboundHttp | OutboundHttp):
                service.access_log = self._logs.get(item.sidecar.access_log)
                service.tracer = self._tracer
            service.metrics.keep_routes({rule.name for host in item.listener.routes.hosts for rule in host.rules})
            self._services[item.service_key] = service
            self._listeners[item.key].serve(service)
        for service in before.values():
            service.drain(idle_s=DEPARTED_IDLE_S)
            self._drained.append(service)
            self._reactor.call_at(self._reactor.now + DEPARTED_TIMEOUT_S, partial(_abort_all, service))
        self._drained = [service for service in self._drained if service.accepted]
        self.taps.attach()

    def _http_services(self) -> Iterator[HttpService]:
        for service in (*self._services.values(), *self._drained):
            if isinstance(service, HttpService):
                yield service

    def _new_target(self, sidecar: SidecarConfig, target: TargetConfig | None) -> Target:
        return Target(self._reactor, self._rng, TargetMetrics(_target_labels(sidecar, target)), self.names)

    def _new_service(self, item: ServedListener) -> Service:
        metrics = ListenerMetrics(_listener_labels(item))
        sidecar, listener = item.sidecar, item.listener
        http = listener.protocol == "http"
        if isinstance(listener, InboundListener):
            target = self._new_target(sidecar, None)
            if http:
                return InboundHttp(self._reactor, metrics, target, self._tracer)
            return InboundTcp(self._reactor, metrics, target)
        target = self._new_target(sidecar, listener.target)
        if http:
            new_target = partial(self._new_target, sidecar)
            return OutboundHttp(self._reactor, metrics, target, self._tracer, new_target)
        return OutboundTcp(self._reactor, metrics, target)

    # ---- sockets that other workers have, or had

    def adopt(self, sockets: Mapping[ListenerKey, socket.socket]) -> None:
        """Keeps listening sockets for the next configuration; what it does not name is closed then."""
        for key, sock in sockets.items():
            former = self._adopted.pop(key, None)
            if former is not None:
                former.close()
            self._adopted[key] = sock

    def _drop_adopted(self) -> None:
        for sock in self._adopted.values():
            sock.close()
        self._adopted.clear()

    def listening(self) -> tuple[tuple[ListenerKey, socket.socket], ...]:
        """Every listening socket, by address and port."""
        return tuple((key, self._listeners[key].sock) for key in sorted(self._listeners))

    # ---- life

    @property
    def open_connections(self) -> int:
        """Accepted connections, those of former configurations included."""
        return sum(len(service.accepted) for service in (*self._services.values(), *self._drained))

    @property
    def open_inbound(self) -> int:
        """Of these, the ones that others opened to the local applications."""
        services = (*self._services.values(), *self._drained)
        return sum(len(service.accepted) for service in services if _is_inbound(service))

    @property
    def has_outbound(self) -> bool:
        """Whether an application calls others through this worker."""
        return not all(map(_is_inbound, self._services.values()))

    def drain(self, *, idle_s: float = 0.0, inbound_only: bool = False) -> None:
        """Stops accepting; what is under way finishes, and idle connections have `idle_s` for one more request."""
        for (*_, address, port), service in self._services.items():
            if inbound_only and not _is_inbound(service):
                continue
            listener = self._listeners.pop(ListenerKey(address, port), None)
            if listener is not None:
                listener.close()
                service.drain(idle_s=idle_s)

    def close(self) -> None:
        """Ends whatever is still open."""
        self.drain()
        self._drop_adopted()
        for service in (*self._services.values(), *self._drained):
            _abort_all(service)
        self._logs.close()
        self._tracer.shutdown(wait_s=SPANS_TIMEOUT_S)

    def describe(self, service: str, refused: Refusal | None) -> Description:
        """What is held for the sidecars of a service, or with that proxy ID; for all when it is empty."""
        served = (
            Served(item, held.metrics, _targets(held))
            for item in listeners(self.config)
            if (held := self._services.get(item.service_key)) is not None
        )
        version, now = self.config.version, self._reactor.time()
        return describe(served, service=service, pid=os.getpid(), version=version, refused=refused, now=now)

    def flush_logs(self) -> None:
        """Writes collected access log lines."""
        self._logs.flush()

    def reopen_logs(self) -> None:
        """Opens log files anew: they have been rotated."""
        self._logs.reopen()

    def _policy_samples(self) -> Iterator[Sample]:
        """Two instances of one service on this host are told apart by no label of these: they count together."""
        sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for service in self._services.values():
            if isinstance(service, InboundHttp | InboundTcp):
                for name, labels, value in service.policy_samples():
                    key = name, tuple(sorted(labels.items()))
                    sums[key] = sums.get(key, 0.0) + value
        for (name, labels_of), value in sums.items():
            yield name, dict(labels_of), value

    def observed(self, since_s: float) -> tuple[ObservedListener, ...]:
        """Who called in the last `since_s` seconds, per inbound listener."""
        inbound = (service for service in self._services.values() if isinstance(service, InboundHttp | InboundTcp))
        return tuple(service.observed(since_s) for service in inbound)

    def samples(self) -> Iterator[Sample]:
        """Every counter of every listener and target. The tables may change before it is at its end."""
        for service in tuple(self._services.values()):
            protocol = "http" if isinstance(service, InboundHttp | OutboundHttp) else "tcp"
            yield from service.metrics.samples(protocol)
            for target in _targets(service):
                yield from tuple(target.samples())
        yield from tuple(self._policy_samples())
        yield "mesh_access_log_dropped", {}, self._logs.dropped


def _targets(service: Service) -> tuple[Target, ...]:
    return tuple(service.targets.values()) if isinstance(service, HttpService) else (service.target,)


def _is_inbound(service: Service) -> bool:
    return isinstance(service, InboundHttp | InboundTcp)


def _abort_all(service: Service) -> None:
    for accepted in tuple(service.accepted):
        accepted.abort()


def _dialed_addresses(config: WorkerConfig) -> set[str]:
    outbound = {
        endpoint.address
        for sidecar in config.sidecars
        for listener in sidecar.outbound
        for target in (listener.target, *listener.targets)
        for endpoint in target.endpoints
    }
    return outbound | {sidecar.inbound.local_address for sidecar in config.sidecars if sidecar.inbound is not None}


def _identity_key(sidecar: SidecarConfig) -> tuple[str, str, tuple[str, ...], str]:
    return sidecar.certificate_chain_pem, sidecar.private_key_pem, sidecar.trust_roots_pem, sidecar.trust_domain
