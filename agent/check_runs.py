"""What the runs of every type of check share, and the tcp check."""

import msgspec
import trio

from agent.addresses import split_address
from agent.reasons import reason_of
from mesh.model.check import CheckDefinition, CheckStatus


class CheckResult(msgspec.Struct, frozen=True):
    """What one run found."""

    status: CheckStatus
    output: str


def http_method(definition: CheckDefinition) -> str:
    """The method of an http check."""
    return definition.method.upper() or "GET"


async def run_tcp(address: str) -> CheckResult:
    """Connects to `host:port` and closes. The caller bounds the time."""
    endpoint = split_address(address)
    assert endpoint is not None, "definitions take no other addresses"
    try:
        stream = await trio.open_tcp_stream(*endpoint)
    except OSError as error:
        return CheckResult("critical", f"TCP connect {address}: {reason_of(error)}")
    await trio.aclose_forcefully(stream)
    return CheckResult("passing", f"TCP connect {address}: Success")
