"""Route tables, compiled once however often a configuration that holds them is checked or applied."""

from functools import lru_cache

from mesh.proxy.router import Router
from mesh.traffic.route import RouteTable


@lru_cache(maxsize=1024)
def compile_routes(
    table: RouteTable, default_target: str, source: str | None, metadata: tuple[tuple[str, str], ...] | None, port: int
) -> Router:
    """A listener's router; see `Router` for the arguments. Raises ConfigError, naming table, host and rule."""
    return Router(
        table, default_target=default_target, source=source, source_metadata=metadata, port=port, scheme="http"
    )
