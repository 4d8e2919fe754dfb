"""`mesh catalog datacenters|nodes|services`."""

import click

from agent.cli.client import Json, Params, connect, segment
from agent.cli.flags import GoGroup, api_flags, format_flag
from agent.cli.output import print_json, print_table

_SHORT_ID_CHARACTERS = 8


@click.group(cls=GoGroup)
def catalog() -> None:
    """Shows what the catalog knows: datacenters, nodes, services."""


@catalog.command()
@api_flags
@format_flag
def datacenters(*, output_format: str, **_: object) -> None:
    """Lists the datacenters."""
    _print_names(connect().get("/v1/catalog/datacenters"), output_format)


@catalog.command()
@click.option("-detailed", is_flag=True, help="Also show tagged addresses and metadata.")
@click.option("-service", help="Only nodes with this service.")
@click.option("-node-meta", "node_meta", multiple=True, metavar="KEY=VALUE", help="Only nodes with this metadata.")
@click.option("-near", help="Sort by round-trip time from this node (_agent: the agent itself).")
@click.option("-filter", "filter_expression", help="Only nodes for which this expression is true.")
@api_flags
@format_flag
def nodes(
    *,
    detailed: bool,
    service: str | None,
    node_meta: tuple[str, ...],
    near: str | None,
    filter_expression: str | None,
    output_format: str,
    **_: object,
) -> None:
    """Lists the nodes."""
    api = connect()
    path = "/v1/catalog/nodes" if service is None else f"/v1/catalog/service/{segment(service)}"
    found = api.get(path, _parameters(node_meta, near, filter_expression))
    assert isinstance(found, list)
    rows = [row for row in found if isinstance(row, dict)]
    if output_format == "json":
        print_json(rows)
        return
    if not rows:
        api.fail("no nodes match")
    listed: dict[str, list[str]] = {}
    for row in rows:
        node_id = str(row.get("ID") or "")
        cells = [str(row["Node"]), node_id if detailed else node_id[:_SHORT_ID_CHARACTERS]]
        cells += [str(row["Address"]), str(row.get("Datacenter") or "")]
        if detailed:
            cells += [_pairs(row.get("TaggedAddresses")), _pairs(row.get("Meta", row.get("NodeMeta")))]
        listed[cells[0]] = cells
    print_table(
        ["Node", "ID", "Address", "DC", *(["TaggedAddresses", "Meta"] if detailed else [])],
        [listed[name] for name in sorted(listed)],
    )


@catalog.command()
@click.option("-tags", is_flag=True, help="Also show each service's tags.")
@click.option("-node", help="Only services on this node.")
@click.option("-node-meta", "node_meta", multiple=True, metavar="KEY=VALUE", help="Only nodes with this metadata.")
@api_flags
@format_flag
def services(*, tags: bool, node: str | None, node_meta: tuple[str, ...], output_format: str, **_: object) -> None:
    """Lists the services."""
    api = connect()
    found: dict[str, set[str]] = {}
    if node is None:
        listed = api.get("/v1/catalog/services", _parameters(node_meta, None, None))
        assert isinstance(listed, dict)
        found = {name: _strings(service_tags) for name, service_tags in listed.items()}
    else:
        answer = api.get(f"/v1/catalog/node/{segment(node)}")
        on_node = answer.get("Services") if isinstance(answer, dict) else {}
        assert isinstance(on_node, dict)
        for instance in on_node.values():
            assert isinstance(instance, dict)
            found.setdefault(str(instance["Service"]), set()).update(_strings(instance.get("Tags")))
    if output_format == "json":
        print_json({name: sorted(found[name]) for name in sorted(found)})
    elif tags:
        print_table(["Service", "Tags"], [[name, ",".join(sorted(found[name]))] for name in sorted(found)])
    else:
        for name in sorted(found):
            click.echo(name)


def _parameters(node_meta: tuple[str, ...], near: str | None, filter_expression: str | None) -> Params:
    params: dict[str, str | int | list[str]] = {}
    if node_meta:
        params["node-meta"] = [pair.replace("=", ":", 1) for pair in node_meta]
    if near:
        params["near"] = near
    if filter_expression:
        params["filter"] = filter_expression
    return params


def _print_names(names: Json, output_format: str) -> None:
    assert isinstance(names, list)
    if output_format == "json":
        print_json(names)
        return
    for name in names:
        click.echo(str(name))


def _strings(values: Json) -> set[str]:
    return {str(value) for value in values} if isinstance(values, list) else set()


def _pairs(values: Json) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(values.items())) if isinstance(values, dict) else ""
