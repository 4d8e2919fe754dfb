"""Finds the command named and imports only its module."""

import importlib
import sys

import click

# command -> module, attribute, one line for the overview
COMMANDS: dict[str, tuple[str, str, str]] = {
    "agent": ("agent.cli.run_agent", "agent", "Runs an agent: a server or a client"),
    "catalog": ("agent.cli.catalog", "catalog", "Shows what the catalog knows: datacenters, nodes, services"),
    "config": ("agent.cli.config_entries", "config", "Reads, writes, lists and deletes central config entries"),
    "demo": ("agent.cli.demo", "demo", "Starts five agents and two services here and shows what the mesh does"),
    "force-leave": ("agent.cli.cluster", "force_leave", "Makes a failed member leave"),
    "info": ("agent.cli.cluster", "info", "Shows an agent's internal state"),
    "intention": ("agent.cli.intention", "intention", "Says which service may call which"),
    "join": ("agent.cli.cluster", "join", "Makes an agent join a cluster by any member's address"),
    "keygen": ("agent.cli.keygen", "keygen", "Makes a gossip key for -encrypt"),
    "kv": ("agent.cli.kv", "kv", "Reads and writes the key-value store"),
    "leave": ("agent.cli.cluster", "leave", "Makes an agent leave its cluster gracefully and stop"),
    "members": ("agent.cli.cluster", "members", "Lists the members of the cluster"),
    "proxy-config": ("agent.cli.proxy_config", "proxy_config", "Shows what the local agent's proxies hold"),
    "services": ("agent.cli.services", "services", "Registers and deregisters services with the local agent"),
    "tap": ("agent.cli.tap", "tap", "Shows the requests that the local agent's proxies carry, live"),
    "version": ("agent.cli.version", "version", "Prints the version"),
    "workers": ("agent.cli.workers", "workers", "Lists the processes that carry sidecar traffic, or replaces them"),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            ctx.fail(f"{args[0]} comes before any command; flags follow theirs, as in `mesh members {args[0]} ...`")
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean `mesh {close[0]}`?" if close else "`mesh --help` lists the commands."
            ctx.fail(f"there is no command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command's module to print one line of each
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "-help", "--help"]}, no_args_is_help=True)
def cli() -> None:
    """A service mesh for hosts, VMs and containers: discovery, identity, policy and routing."""


def main() -> None:
    """The console script. Exit status: 0 done, 1 failed, 2 wrong usage."""
    if sys.argv[1:] in (["-version"], ["--version"], ["-v"]):
        sys.argv[1:] = ["version"]
    try:
        cli(prog_name="mesh")
    except BrokenPipeError:
        # the reader (`| head`) has what it wanted; stop Python from complaining again at exit
        sys.stderr.close()
        sys.exit(0)
