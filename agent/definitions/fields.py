"""What the definitions of services, proxies and checks have in common, and how they refuse what we cannot honour."""

from collections.abc import Iterable

from agent.strict_json import Fields
from mesh.errors import InvalidRequest
from mesh.model.catalog import ServiceAddress


def refuse_unsupported(fields: Fields, names: Iterable[str], what: str) -> None:
    """Raises InvalidRequest when a field that we cannot honour holds anything but its zero value.

    Go's client sends empty objects for fields that its user never touched.
    """
    for name in names:
        if holds_something(fields.raw(name)):
            raise InvalidRequest(f"{name} of a {what} is not supported yet")


def holds_something(value: object) -> bool:
    """Whether the value, or anything inside of it, differs from its zero value."""
    if isinstance(value, dict):
        return any(holds_something(inner) for inner in value.values())
    return bool(value)


def refuse_tenancy(fields: Fields) -> None:
    """Raises InvalidRequest for a namespace or partition that is not the default one."""
    for name in ("Namespace", "Partition"):
        if fields.text(name) not in ("", "default"):
            raise InvalidRequest(f"Invalid {name.lower()} {fields.text(name)!r}: there is only the default one")


def tagged_addresses(fields: Fields) -> dict[str, ServiceAddress]:
    """The `TaggedAddresses` of a service. Raises MalformedJson."""
    addresses: dict[str, ServiceAddress] = {}
    for tag, value in fields.mapping("TaggedAddresses").items():
        inner = Fields(value, ("Address", "Port"), where=f"TaggedAddresses[{tag}]")
        addresses[tag] = ServiceAddress(inner.text("Address"), inner.integer("Port", low=0, high=65535))
    return addresses
