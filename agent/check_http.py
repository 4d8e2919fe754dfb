"""The http check: one request on a new connection."""

import ssl
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
import trio

from agent.check_runs import CheckResult, http_method
from agent.reasons import reason_of
from mesh.model.check import CheckDefinition

OUTPUT_BYTES = 4096  # of a response's body that is read and shown
REDIRECTS_MAX = 10  # as Go's client follows
USER_AGENT = "Consul Health Check"


class HttpChecker:
    """Runs http checks. Connections are not kept: a check is to prove that a new one can be made."""

    def __init__(self) -> None:
        self._clients: dict[bool, httpx.AsyncClient] = {}

    async def close(self) -> None:
        """Frees the clients."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await client.aclose()

    async def _client(self, *, verify: bool) -> httpx.AsyncClient:
        client = self._clients.get(verify)
        if client is None:
            # Reading the system's certificates takes tens of milliseconds: not on the loop.
            context = await trio.to_thread.run_sync(ssl.create_default_context)
            if not verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            fresh = httpx.AsyncClient(
                verify=context,
                trust_env=False,
                timeout=None,  # the caller bounds the whole run
                max_redirects=REDIRECTS_MAX,
                # Cookies know no ports: what one service sets would be sent to its neighbours, and be kept for ever.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            )
            client = self._clients.setdefault(verify, fresh)
        return client

    async def run(self, definition: CheckDefinition) -> CheckResult:
        """2xx passes, 429 warns, everything else is critical. The caller bounds the time."""
        method, url = http_method(definition), definition.http
        headers = [
            ("User-Agent", USER_AGENT),
            ("Accept", "text/plain, text/*, */*"),
            ("Accept-Encoding", "identity"),
        ]
        given = {name.lower() for name in definition.header}
        headers = [(name, value) for name, value in headers if name.lower() not in given]
        headers += [(name, value) for name, values in definition.header.items() for value in values]
        extensions = {"sni_hostname": definition.tls_server_name} if definition.tls_server_name else {}
        limit = min(definition.output_bytes_max or OUTPUT_BYTES, OUTPUT_BYTES)
        try:
            client = await self._client(verify=not definition.tls_skip_verify)
            async with client.stream(
                method,
                url,
                headers=headers,
                content=definition.body.encode() or None,
                follow_redirects=not definition.disable_redirects,
                extensions=extensions,
            ) as response:
                body = b""
                # Read to the end, as a server that cannot finish its answer is not well; the deadline bounds it. Never
                # decompressed: a kilobyte may become a gigabyte, and encodings may be stacked.
                async for chunk in response.aiter_raw():
                    body += chunk[: limit - len(body)]
                code, phrase = response.status_code, response.reason_phrase
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError, ValueError) as error:
            return CheckResult("critical", f'{method} "{url}": {_http_reason(error)}')
        text = body.decode("utf-8", "replace")
        output = f"HTTP {method} {url}: {f'{code} {phrase}'.rstrip()} Output: {text}"
        if 200 <= code <= 299:
            return CheckResult("passing", output)
        return CheckResult("warning" if code == httpx.codes.TOO_MANY_REQUESTS else "critical", output)


def _http_reason(error: BaseException) -> str:
    """The system's reason beneath httpx's layers where there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and (cause.errno or isinstance(cause.__cause__, BaseExceptionGroup)):
            return reason_of(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__
