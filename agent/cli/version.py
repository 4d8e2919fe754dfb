"""`mesh version`."""

import click

from agent.cli.flags import GoCommand, format_flag


@click.command(cls=GoCommand)
@format_flag
def version(output_format: str) -> None:
    """Prints the version of this program and of the protocols it speaks."""
    from agent.version import BuildInfo

    build = BuildInfo()
    if output_format == "json":
        import json

        click.echo(
            json.dumps(
                {
                    "Version": build.version,
                    "ConsulAPI": build.consul_api_version,
                    "GossipProtocol": build.gossip_protocol,
                    "RaftProtocol": build.raft_protocol,
                },
                indent=4,
            )
        )
        return
    click.echo(f"Mesh v{build.version}")
    click.echo(f"Speaks the HTTP API of Consul {build.consul_api_version}, gossip protocol {build.gossip_protocol}")
