"""The one place where an error becomes a status and a text.

Consul answers 500 with the bare message for most of what a server refuses; its clients look for these texts.
"""

from agent.http.request import ApiResponse, text_response
from agent.strict_json import MalformedJson
from mesh.errors import InvalidRequest, LimitExceeded, MeshError, NoLeader, NotFound, NotLeader

NO_LEADER_TEXT = "No cluster leader"


def error_response(error: MeshError | MalformedJson) -> ApiResponse:
    """400 InvalidRequest and MalformedJson, 404 NotFound, 429 LimitExceeded, else 500 with Consul's text."""
    match error:
        case MalformedJson():
            return text_response(f"Request decode failed: {error}", status=400)
        case InvalidRequest():
            return text_response(str(error), status=400)
        case NotFound():
            return text_response(str(error), status=404)
        case LimitExceeded():
            return text_response(str(error), status=429)
        case NoLeader() | NotLeader():
            return text_response(NO_LEADER_TEXT, status=500)
    return text_response(str(error), status=500)
