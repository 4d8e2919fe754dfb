"""The two applications of the demo: plain HTTP programs that know nothing of the mesh.

`python -m agent.cli.demo_app api-1 PORT` answers with its name; with a third argument, a URL, it asks there first and
passes the answer on, as `web` does with its upstream `api`.
"""

import http.client
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_UPSTREAM_TIMEOUT_S = 10.0


def _handler(name: str, upstream: str | None) -> type[BaseHTTPRequestHandler]:
    connections = threading.local()

    def ask_upstream() -> tuple[int, str]:
        assert upstream is not None
        connection: http.client.HTTPConnection | None = getattr(connections, "one", None)
        if connection is None:
            connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=_UPSTREAM_TIMEOUT_S)
            connections.one = connection
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            connections.one = None
            return 502, f"cannot reach the upstream: {error!r}"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Otherwise headers and body go out as two segments, and the second waits for a delayed acknowledgement.
        wbufsize = -1

        def do_GET(self) -> None:
            status, answer = 200, "hello"
            if upstream is not None and self.path != "/health":
                status, answer = ask_upstream()
            body = json.dumps({"service": name, "answer": answer}).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def main() -> None:
    name, port, *upstream = sys.argv[1:]
    ThreadingHTTPServer(("127.0.0.1", int(port)), _handler(name, upstream[0] if upstream else None)).serve_forever()


if __name__ == "__main__":
    main()
