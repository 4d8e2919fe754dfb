"""One line per request in Envoy's default format (envoyproxy docs, "Default format string")."""

import datetime

import msgspec


class LogRecord(msgspec.Struct, frozen=True, gc=False):
    """What a line is made of. Times are seconds; `started_at_s` is Unix time. Empty values print as `-`.

    `status` 0 means that the caller left before any response.
    """

    started_at_s: float
    method: bytes
    path: bytes
    protocol: bytes
    status: int
    flags: str
    bytes_received: int
    bytes_sent: int
    duration_s: float
    upstream_service_time_s: float | None
    forwarded_for: bytes
    user_agent: bytes
    request_id: bytes
    authority: bytes
    upstream_host: str


def _text(value: bytes) -> str:
    # Quotes, controls and bytes outside ASCII are escaped: a header may not forge a second line or field.
    return value.decode("latin-1").encode("unicode_escape").decode("ascii").replace('"', '\\"') if value else "-"


def _timestamp(unix_time_s: float) -> str:
    moment = datetime.datetime.fromtimestamp(unix_time_s, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def format_line(record: LogRecord) -> str:
    """A line: `[START_TIME] "METHOD PATH PROTOCOL" CODE FLAGS RECEIVED SENT DURATION SERVICE_TIME "XFF" "UA" ...`."""
    service_time = "-"
    if record.upstream_service_time_s is not None:
        service_time = str(int(record.upstream_service_time_s * 1000))
    return (
        f'[{_timestamp(record.started_at_s)}] "{_text(record.method)} {_text(record.path)} {_text(record.protocol)}" '
        f"{record.status} {record.flags or '-'} {record.bytes_received} {record.bytes_sent} "
        f'{int(record.duration_s * 1000)} {service_time} "{_text(record.forwarded_for)}" "{_text(record.user_agent)}" '
        f'"{_text(record.request_id)}" "{_text(record.authority)}" "{record.upstream_host or "-"}"\n'
    )
