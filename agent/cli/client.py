"""A command's connection to an agent's HTTP API; whatever goes wrong becomes one sentence that says what to do next."""

import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn
from urllib.parse import quote

import click
import httpx

_DEFAULT_ADDRESS = "127.0.0.1:8500"
_CONNECT_TIMEOUT_S = 5.0
# A write may wait for an election (7 s at the server) and `join` for several unreachable addresses.
_ANSWER_TIMEOUT_S = 60.0

# What to do about an answer of the API whose text is Consul's, and so cannot say it itself.
_HINTS = {
    "No known Consul servers": ".\nThis client agent has found no server; `mesh members` shows whom it knows, "
    "`mesh join ADDRESS` or -retry-join makes it find them.",
    "No cluster leader": ".\nAn election is under way, or less than a majority of the servers runs; "
    "`mesh members` shows them.",
}

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Params = Mapping[str, str | int | Sequence[str]]


def segment(text: str) -> str:
    """A name as one path segment."""
    return quote(text, safe="")


class Api:
    """An agent, as commands speak to it. Any failure prints to stderr and exits with `failure_status`."""

    def __init__(self, http: httpx.Client, shown: str, defaults: dict[str, str], *, failure_status: int = 1) -> None:
        self._http = http
        self._shown = shown
        self._defaults = defaults
        self._failure_status = failure_status

    def get(self, path: str, params: Params | None = None) -> Json:
        """The decoded JSON answer."""
        return self._decoded(self.call("GET", path, params))

    def get_or_none(self, path: str, params: Params | None = None) -> Json:
        """As `get`, None when the answer is 404."""
        response = self.call("GET", path, params, accept=(404,))
        return None if response.status_code == 404 else self._decoded(response)

    def put(self, path: str, params: Params | None = None, *, body: bytes | Json = b"") -> Json:
        """The decoded JSON answer, None when it is empty."""
        response = self.call("PUT", path, params, body=body)
        return self._decoded(response) if response.content.strip() else None

    def delete(self, path: str, params: Params | None = None) -> Json:
        """The decoded JSON answer, None when it is empty."""
        response = self.call("DELETE", path, params)
        return self._decoded(response) if response.content.strip() else None

    def call(
        self,
        method: str,
        path: str,
        params: Params | None = None,
        *,
        body: bytes | Json = b"",
        accept: Sequence[int] = (),
    ) -> httpx.Response:
        """The raw answer; a status that is neither 2xx nor in `accept` ends the command."""
        query: dict[str, str | int | Sequence[str]] = {**self._defaults, **(params or {})}
        content = body if isinstance(body, bytes) else None
        try:
            response = self._http.request(
                method, path, params=query, content=content, json=body if content is None else None
            )
        except httpx.ConnectError as error:
            self._unreachable(error)
        except httpx.TimeoutException:
            self.fail(
                f"the agent at {self._shown} did not answer {method} {path} in time; is it overloaded or stopped?"
            )
        except httpx.HTTPError as error:
            self.fail(f"{method} {path} at {self._shown} failed: {_reason(error)}")
        if response.is_success or response.status_code in accept:
            return response
        self._refused(response, path)

    def _unreachable(self, error: httpx.ConnectError) -> NoReturn:
        if isinstance(_cause(error), ssl.SSLError):
            self.fail(f"no TLS with the agent at {self._shown}: {_reason(error)}. Is that its https port, and its CA?")
        self.fail(
            f"cannot connect to the agent at {self._shown}: {_reason(error)}.\n"
            "Is one running there? `mesh agent -dev` starts one; -http-addr or MESH_HTTP_ADDR name another."
        )

    def _refused(self, response: httpx.Response, path: str) -> NoReturn:
        answer = response.text.strip() or path
        self.fail(f"the agent at {self._shown} answered {response.status_code}: {answer}{_HINTS.get(answer, '')}")

    def lines(self, path: str, params: Params | None = None) -> Iterator[str]:
        """The lines of an answer that does not end by itself, empty ones left out, as they come."""
        query: dict[str, str | int | Sequence[str]] = {**self._defaults, **(params or {})}
        timeout = httpx.Timeout(_ANSWER_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        try:
            with self._http.stream("GET", path, params=query, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    self._refused(response, path)
                yield from filter(None, response.iter_lines())
        except httpx.ConnectError as error:
            self._unreachable(error)
        except httpx.HTTPError as error:
            self.fail(f"the connection to the agent at {self._shown} ended: {_reason(error)}")

    def fail(self, message: str) -> NoReturn:
        """Prints the message to stderr and ends the command."""
        click.echo(f"Error: {message}", err=True)
        raise SystemExit(self._failure_status)

    def _decoded(self, response: httpx.Response) -> Json:
        try:
            answer: Json = response.json()
        except ValueError:
            self.fail(f"{self._shown} answered something that is not JSON: is it a mesh or Consul agent?")
        return answer


def _cause(error: Exception) -> BaseException:
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__ or cause
    return cause


def _reason(error: Exception) -> str:
    cause = _cause(error)
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return str(cause) or type(cause).__name__


def connect(*, failure_status: int = 1) -> Api:
    """The agent that the current command's flags and the environment name."""
    flags = click.get_current_context().params
    environment = os.environ.get
    address = flags.get("http_addr") or environment("MESH_HTTP_ADDR") or environment("CONSUL_HTTP_ADDR")
    address = address or _DEFAULT_ADDRESS
    transport: httpx.HTTPTransport | None = None
    verify = _verification(flags)
    base_url = address
    if address.startswith("unix://"):
        transport = httpx.HTTPTransport(uds=address.removeprefix("unix://"))
        base_url = "http://localhost"
    elif "://" not in address:
        scheme = "https" if environment("CONSUL_HTTP_SSL", "").lower() in ("1", "true") else "http"
        host = "127.0.0.1" if address.startswith(":") else ""
        base_url = f"{scheme}://{host}{address}"
    elif not address.startswith(("http://", "https://")):
        raise click.BadParameter(f"{address!r} is neither host:port, http(s):// nor unix://", param_hint="-http-addr")
    token = flags.get("token") or environment("CONSUL_HTTP_TOKEN")
    defaults: dict[str, str] = {}
    if flags.get("datacenter"):
        defaults["dc"] = str(flags["datacenter"])
    if flags.get("stale"):
        defaults["stale"] = ""
    try:
        http = httpx.Client(
            base_url=base_url,
            transport=transport,
            verify=verify,
            headers={"X-Consul-Token": str(token)} if token else {},
            timeout=httpx.Timeout(_ANSWER_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            trust_env=False,
        )
        click.get_current_context().call_on_close(http.close)
        http.build_request("GET", "/")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, ValueError) as error:
        raise click.BadParameter(f"{address!r} is no address: {error}", param_hint="-http-addr") from error
    return Api(http, address, defaults, failure_status=failure_status)


def _verification(flags: Mapping[str, object]) -> ssl.SSLContext | bool:
    ca_file = flags.get("ca_file") or os.environ.get("CONSUL_CACERT")
    certificate = flags.get("client_cert") or os.environ.get("CONSUL_CLIENT_CERT")
    key = flags.get("client_key") or os.environ.get("CONSUL_CLIENT_KEY")
    if os.environ.get("CONSUL_HTTP_SSL_VERIFY", "").lower() in ("0", "false"):
        return False
    if not ca_file and not certificate:
        return True
    try:
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        if certificate:
            context.load_cert_chain(str(certificate), str(key) if key else None)
    except (OSError, ssl.SSLError) as error:
        raise click.BadParameter(f"cannot load {certificate or ca_file}: {error}", param_hint="-ca-file") from error
    return context
