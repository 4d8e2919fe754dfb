"""Errors as they cross the wire."""

from agent.rpc.frames import Failure
from mesh import errors
from mesh.errors import MeshError, NotLeader

_ERRORS: dict[str, type[MeshError]] = {
    kind.__name__: kind
    for kind in (
        errors.InvalidRequest,
        errors.NotFound,
        errors.Refused,
        errors.LimitExceeded,
        errors.NoLeader,
        errors.OutcomeUnknown,
        errors.Unreachable,
    )
}


def error_to_failure(request_id: int, error: MeshError) -> Failure:
    """The error as it crosses the wire."""
    leader_id = error.leader_id if isinstance(error, NotLeader) else None
    return Failure(request_id, type(error).__name__, str(error), leader_id)


def failure_to_error(failure: Failure) -> MeshError:
    """The error that the far side raised, as ours: the same class where a caller could handle it."""
    if failure.kind == NotLeader.__name__:
        return NotLeader(failure.leader_id)
    return _ERRORS.get(failure.kind, MeshError)(failure.text)
