"""`mesh kv get|put|delete`."""

import base64
import sys
from pathlib import Path

import click

from agent.cli.client import Api, Json, connect
from agent.cli.flags import GoGroup, api_flags, format_flag
from agent.cli.output import print_json


@click.group(cls=GoGroup)
def kv() -> None:
    """Reads and writes the key-value store."""


def _path(key: str) -> str:
    from urllib.parse import quote

    return "/v1/kv/" + quote(key, safe="/")


def _value(entry: dict[str, Json]) -> bytes:
    return base64.b64decode(str(entry["Value"])) if entry.get("Value") is not None else b""


@kv.command()
@click.argument("key", default="")
@click.option("-recurse", is_flag=True, help="Every key that begins with KEY.")
@click.option("-keys", is_flag=True, help="Only the names of the keys that begin with KEY.")
@click.option("-separator", default="/", help="With -keys: cut names after it.", show_default=True)
@click.option("-detailed", is_flag=True, help="Also show indexes, flags and session.")
@click.option("-base64", "as_base64", is_flag=True, help="Leave values encoded in base64.")
@api_flags
@format_flag
def get(
    *,
    key: str,
    recurse: bool,
    keys: bool,
    separator: str,
    detailed: bool,
    as_base64: bool,
    output_format: str,
    **_: object,
) -> None:
    """Prints the value of KEY, exactly as stored."""
    api = connect()
    if not key and not (recurse or keys):
        raise click.UsageError("which key? (-recurse or -keys without one mean the whole store)")
    if keys:
        names = api.get_or_none(_path(key), {"keys": "", "separator": separator})
        _print_keys(names, output_format)
        return
    found = api.get_or_none(_path(key), {"recurse": ""} if recurse else None)
    if not isinstance(found, list):
        if recurse:
            return
        api.fail(f"no key exists at: {key}")
    entries = [entry for entry in found if isinstance(entry, dict)]
    if output_format == "json":
        print_json(entries)
        return
    for number, entry in enumerate(entries):
        if detailed:
            if number:
                click.echo()
            _print_detailed(entry, as_base64=as_base64)
        elif recurse:
            sys.stdout.buffer.write(str(entry["Key"]).encode() + b":" + _shown(entry, as_base64=as_base64) + b"\n")
        else:
            sys.stdout.buffer.write(_shown(entry, as_base64=as_base64) + b"\n")
    sys.stdout.buffer.flush()


def _print_keys(names: Json, output_format: str) -> None:
    listed = [str(name) for name in names] if isinstance(names, list) else []
    if output_format == "json":
        print_json(listed)
        return
    for name in listed:
        click.echo(name)


def _shown(entry: dict[str, Json], *, as_base64: bool) -> bytes:
    value = _value(entry)
    return base64.b64encode(value) if as_base64 else value


def _print_detailed(entry: dict[str, Json], *, as_base64: bool) -> None:
    click.echo(f"CreateIndex      {entry['CreateIndex']}")
    click.echo(f"Flags            {entry['Flags']}")
    click.echo(f"Key              {entry['Key']}")
    click.echo(f"LockIndex        {entry['LockIndex']}")
    click.echo(f"ModifyIndex      {entry['ModifyIndex']}")
    click.echo(f"Session          {entry.get('Session') or '-'}")
    click.echo(f"Value            {_shown(entry, as_base64=as_base64).decode(errors='replace')}")


@kv.command()
@click.argument("key")
@click.argument("data", required=False)
@click.option("-cas", is_flag=True, help="Only if the key's ModifyIndex equals -modify-index (0: only if it is new).")
@click.option("-modify-index", type=click.IntRange(min=0), help="The index for -cas.")
@click.option("-flags", type=click.IntRange(0, 2**64 - 1), default=0, help="A number stored beside the value.")
@click.option("-base64", "is_base64", is_flag=True, help="DATA is base64.")
@api_flags
def put(
    *, key: str, data: str | None, cas: bool, modify_index: int | None, flags: int, is_base64: bool, **_: object
) -> None:
    """Stores DATA at KEY. `@file` reads a file, `-` standard input; without DATA the value is empty."""
    api = connect()
    value = _read(api, data)
    if is_base64:
        try:
            value = base64.b64decode(value, validate=True)
        except ValueError as error:
            api.fail(f"DATA is not base64: {error}")
    params: dict[str, str | int] = {"flags": flags} if flags else {}
    if cas:
        if modify_index is None:
            raise click.UsageError("-cas needs -modify-index (0 to create the key only if it is new)")
        params["cas"] = modify_index
    if api.put(_path(key), params, body=value) is not True:
        api.fail(f"did not write to {key}: its ModifyIndex is no longer {modify_index}")
    click.echo(f"Success! Data written to: {key}")


def _read(api: Api, data: str | None) -> bytes:
    if data is None:
        return b""
    if data == "-":
        return sys.stdin.buffer.read()
    if data.startswith("@"):
        try:
            return Path(data[1:]).read_bytes()
        except OSError as error:
            api.fail(f"cannot read {data[1:]}: {error.strerror}")
    return data.encode()


@kv.command()
@click.argument("key")
@click.option("-recurse", is_flag=True, help="Every key that begins with KEY.")
@click.option("-cas", is_flag=True, help="Only if the key's ModifyIndex equals -modify-index.")
@click.option("-modify-index", type=click.IntRange(min=1), help="The index for -cas.")
@api_flags
def delete(*, key: str, recurse: bool, cas: bool, modify_index: int | None, **_: object) -> None:
    """Deletes KEY, or with -recurse every key that begins with it."""
    api = connect()
    params: dict[str, str | int] = {"recurse": ""} if recurse else {}
    if cas:
        if modify_index is None or recurse:
            raise click.UsageError("-cas needs -modify-index and one key: not with -recurse")
        params["cas"] = modify_index
    if api.delete(_path(key), params) is not True:
        api.fail(f"did not delete {key}: its ModifyIndex is no longer {modify_index}")
    click.echo(f"Success! Deleted keys with prefix: {key}" if recurse else f"Success! Deleted key: {key}")
