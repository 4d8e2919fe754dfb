"""Endpoint names are looked up beside the traffic."""

import socket

import pytest
import trio

from agent.dataplane.names import REFRESH_INTERVAL_S, Names


class Resolver(trio.abc.HostnameResolver):
    """Answers from a table; None never answers."""

    def __init__(self, table):
        self.table = table
        self.asked = []

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):
        name = host.decode() if isinstance(host, bytes) else host
        self.asked.append(name)
        answer = self.table.get(name, "")
        if answer is None:
            await trio.sleep_forever()
        if not answer:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, 0))]

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


async def test_names_are_kept_fresh_and_the_last_answer_survives_failures(autojump_clock, nursery):
    resolver = Resolver({"api.test": "10.0.0.1", "stuck.test": None})
    trio.socket.set_custom_hostname_resolver(resolver)
    names = Names()
    nursery.start_soon(names.run)
    names.want({"api.test", "stuck.test", "gone.test", "10.9.9.9", "localhost"})
    with pytest.raises(OSError, match=r"api\.test"):
        names.address_of("api.test")
    await trio.sleep(1)
    assert names.address_of("api.test") == "10.0.0.1"
    assert names.address_of("10.9.9.9") == "10.9.9.9"
    assert names.address_of("localhost") == "127.0.0.1"
    resolver.table["api.test"] = "10.0.0.2"
    await trio.sleep(4 * REFRESH_INTERVAL_S)
    assert names.address_of("api.test") == "10.0.0.2"
    del resolver.table["api.test"]
    await trio.sleep(4 * REFRESH_INTERVAL_S)
    assert names.address_of("api.test") == "10.0.0.2"
    for unknown in ("gone.test", "stuck.test"):
        with pytest.raises(OSError, match=unknown):
            names.address_of(unknown)
    assert "10.9.9.9" not in resolver.asked
    names.want(set())
    with pytest.raises(OSError, match=r"api\.test"):
        names.address_of("api.test")
    nursery.cancel_scope.cancel()
