"""Two services on a real cluster: `web` calls `api` (HTTP, two instances) and `echo` (TCP) through sidecars."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peers import Application, get
from processes import AgentProcess, Cluster, cluster_of, wait_until

APP_PORT, ECHO_PORT = 8080, 8081
API_SIDECAR_PORT, WEB_SIDECAR_PORT, ECHO_SIDECAR_PORT = 21000, 21001, 21002
TO_API, TO_ECHO = 9191, 9192


class Meshed:
    """A cluster whose first client runs `web`; `api` runs on the agents given, `echo` on the last of these."""

    def __init__(self, cluster: Cluster, api_on: list[AgentProcess]) -> None:
        self.cluster = cluster
        self.web = cluster.clients[0]
        self.api_on = api_on
        self.apps = {agent.name: Application(agent.address, APP_PORT, name=agent.name) for agent in api_on}
        self.echo = Application(api_on[-1].address, ECHO_PORT, kind="tcp")

    def register(self) -> None:
        """Registers everything, and waits until each instance has answered `web`."""
        for name in ("web", "api"):
            self.web.put("/v1/config", {"Kind": "service-defaults", "Name": name, "Protocol": "http"})
        for agent in self.api_on:
            agent.register("api", APP_PORT, sidecar_port=API_SIDECAR_PORT)
        self.api_on[-1].register("echo", ECHO_PORT, sidecar_port=ECHO_SIDECAR_PORT)
        upstreams = {"api": TO_API, "echo": TO_ECHO}
        self.web.register("web", APP_PORT, sidecar_port=WEB_SIDECAR_PORT, upstreams=upstreams)
        self.wait_instances(*self.apps)
        wait_until(lambda: json.loads(self.web.get("/v1/health/connect/echo?passing") or b"[]"))

    def ask(self) -> tuple[int, bytes]:
        """What `web` hears from `api`, over a new connection; status 0 when the connection fails."""
        try:
            return get(self.web.address, TO_API)
        except (OSError, AssertionError) as error:
            return 0, repr(error).encode()

    def wait_instances(self, *names: str) -> None:
        """Until the answers of twenty requests in a row come from exactly these instances."""
        wanted = {(200, name.encode()) for name in names}
        wait_until(lambda: {self.ask() for _ in range(20)} == wanted, why=lambda: repr(self.ask()))

    def close(self) -> None:
        for app in (*self.apps.values(), self.echo):
            app.stop()


@contextmanager
def meshed(folder: Path, *flags: str, api_on_all: bool = False, **options: object) -> Iterator[Meshed]:
    """Three servers and two clients; `api` on both clients, or on every agent."""
    with cluster_of(folder, *flags, **options) as cluster:
        made = Meshed(cluster, cluster.agents if api_on_all else cluster.clients)
        try:
            made.register()
            yield made
        finally:
            made.close()
