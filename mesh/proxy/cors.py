"""Cross-origin rules, decided as Envoy's CORS filter does: preflights are answered here, other answers get headers.

A request whose origin is not allowed goes on untouched: the browser refuses its answer. The allowed origin is echoed,
never `*`, whatever the rule says.
"""

from mesh.http.head import Headers, RequestHead, first_value
from mesh.model.matching import compile_string
from mesh.traffic.route import Cors


class CorsRules:
    """A compiled `Cors`. Raises ConfigError for a bad regular expression."""

    __slots__ = ("_allows_all", "_origins", "_preflight", "_replaced", "_response")

    def __init__(self, cors: Cors) -> None:
        self._origins = tuple(map(compile_string, cors.allow_origins))
        self._allows_all = any(check(b"*") for check in self._origins)  # Envoy asks each whether it matches `*`
        credentials: Headers = ((b"access-control-allow-credentials", b"true"),) if cors.allow_credentials else ()
        preflight = list(credentials)
        for name, values in (("methods", cors.allow_methods), ("headers", cors.allow_headers)):
            if values:
                preflight.append((f"access-control-allow-{name}".encode(), ",".join(values).encode()))
        if cors.max_age_s is not None:
            preflight.append((b"access-control-max-age", b"%d" % cors.max_age_s))
        self._preflight: Headers = tuple(preflight)
        self._response = credentials
        if cors.expose_headers:
            self._response += ((b"access-control-expose-headers", ",".join(cors.expose_headers).encode()),)
        self._replaced = {b"access-control-allow-origin", *(name for name, _ in self._response)}

    def allowed_origin(self, head: RequestHead) -> bytes | None:
        """The request's origin when it has one that is allowed; None: CORS does nothing for this request."""
        origin = first_value(head.headers, b"origin")
        if not origin or not (self._allows_all or any(check(origin) for check in self._origins)):
            return None
        return origin

    def preflight(self, head: RequestHead, origin: bytes) -> Headers | None:
        """The headers of the 200 that answers a preflight from an allowed origin; None: it is no preflight."""
        if head.method != b"OPTIONS" or not first_value(head.headers, b"access-control-request-method"):
            return None
        return ((b"access-control-allow-origin", origin), *self._preflight)

    def response_headers(self, headers: Headers, origin: bytes) -> Headers:
        """The response's headers with ours, which replace what the application said about the same."""
        kept = [header for header in headers if header[0] not in self._replaced]
        return (*kept, (b"access-control-allow-origin", origin), *self._response)
