"""What this build calls itself, and the version of the API it speaks."""

from dataclasses import dataclass

VERSION = "0.1.0"

# The Consul API that agents answer with, as clients read it from the `build` tag and /v1/agent/self.
CONSUL_API_VERSION = "1.22.0"


@dataclass(frozen=True)
class BuildInfo:
    version: str = VERSION
    consul_api_version: str = CONSUL_API_VERSION
    gossip_protocol: int = 5
    raft_protocol: int = 3
