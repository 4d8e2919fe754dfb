"""Flags as Go programs read them: `-flag` and `--flag` alike, `-flag=value`, `-switch=false`, arguments after flags."""

import difflib
from collections.abc import Callable
from typing import TypeVar

import click

F = TypeVar("F", bound=Callable[..., object])

_TRUE = ("1", "t", "true")
_FALSE = ("0", "f", "false")


class GoCommand(click.Command):
    """A command whose flags may have one dash or two; the first argument that is no flag ends them, as in Consul."""

    allow_interspersed_args = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        settings = {"help_option_names": ["-h", "-help"]}
        super().__init__(*args, **{"context_settings": settings, **kwargs})  # type: ignore[arg-type]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        normalised, switched_off = _normalise(ctx, args, self.get_params(ctx))
        rest = super().parse_args(ctx, normalised)
        # Not given and given as false differ: the latter turns off what a configuration file turned on.
        ctx.params.update(dict.fromkeys(switched_off, False))
        return rest


class GoGroup(click.Group):
    """A group of GoCommands."""

    command_class = GoCommand

    def __init__(self, *args: object, **kwargs: object) -> None:
        settings = {"help_option_names": ["-h", "-help", "--help"]}
        super().__init__(*args, **{"context_settings": settings, **kwargs})  # type: ignore[arg-type]


def _normalise(ctx: click.Context, args: list[str], params: list[click.Parameter]) -> tuple[list[str], set[str]]:
    """One dash before every flag, no value after a switch, everything from the first argument on untouched; and the
    parameters of the switches that were given as false.
    """
    options = {name: param for param in params if isinstance(param, click.Option) for name in param.opts}
    rest = list(args)
    flags: list[str] = []
    switched_off: set[str] = set()
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        name, equals, value = rest.pop(0).partition("=")
        if name.startswith("--"):
            name = name[1:]
        option = options.get(name)
        if option is None:
            close = difflib.get_close_matches(name, options, n=1)
            ctx.fail(f"there is no flag {name}. {f'Did you mean {close[0]}?' if close else ''}".rstrip())
        if option.is_flag and equals:
            if value.lower() not in _TRUE + _FALSE:
                raise click.BadParameter(f"{value!r} is not true or false", param_hint=name)
            if value.lower() in _TRUE:
                flags.append(name)
            elif option.name is not None:
                switched_off.add(option.name)
            continue
        flags.append(name + equals + value)
        if not option.is_flag and not equals and rest:
            flags[-1] = f"{name}={rest.pop(0)}"
    return flags + rest, switched_off


def format_flag(function: F) -> F:
    """Adds `-format`, passed as `output_format`."""
    return click.option(
        "-format",
        "output_format",
        type=click.Choice(["pretty", "json"]),
        default="pretty",
        help="Output: pretty (a table on a terminal, plain columns in a pipe) or json.",
    )(function)


def api_flags(function: F) -> F:
    """Adds the flags every command that talks to an agent takes; click's context carries them to `client.connect`."""
    for decorator in reversed(
        (
            click.option(
                "-http-addr",
                "http_addr",
                help="The agent's address: host:port, a URL or unix://path. [default: $MESH_HTTP_ADDR, "
                "$CONSUL_HTTP_ADDR or 127.0.0.1:8500]",
            ),
            click.option("-token", "token", help="ACL token. [default: $CONSUL_HTTP_TOKEN]"),
            click.option("-datacenter", "datacenter", help="Datacenter to ask. [default: the agent's]"),
            click.option("-stale", "stale", is_flag=True, help="Let any server answer reads, without the leader."),
            click.option(
                "-ca-file", "ca_file", help="CA certificates to verify an https agent. [default: $CONSUL_CACERT]"
            ),
            click.option("-client-cert", "client_cert", help="Certificate to show. [default: $CONSUL_CLIENT_CERT]"),
            click.option("-client-key", "client_key", help="Its key. [default: $CONSUL_CLIENT_KEY]"),
        )
    ):
        function = decorator(function)
    return function
