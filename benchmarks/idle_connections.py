"""10,000 idle connections: resident memory of our worker, and of Envoy, on the plain side and on the mTLS side.

Both sides are measured in workers of their own, each connection having carried one request (mTLS) or none (plain).
"""

import resource
import socket
import ssl
import sys
import time

from benchmarks.sidecar_pairs import (
    ADDRESS,
    envoy_two_hops,
    parse,
    rss_mib,
    serving,
    two_hops,
    verdict,
)

CONNECTIONS = 10_000
MIB_MAX = 250.0


def open_plain(port):
    """Idle clients of the outbound listener."""
    return [socket.create_connection((ADDRESS, port), timeout=20) for _ in range(CONNECTIONS)]


def open_tls(port, context):
    """Idle clients of the inbound listener, handshake done."""
    opened = []
    for _ in range(CONNECTIONS):
        plain = socket.create_connection((ADDRESS, port), timeout=20)
        opened.append(context.wrap_socket(plain, server_hostname="api"))
    return opened


def client_context(authority, directory):
    """A TLS client with the leaf of service web."""
    chain, key = authority.leaf("web")
    pair = directory / "client.pem"
    pair.write_text(chain + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=authority.root.root_cert_pem)
    context.load_cert_chain(pair)
    return context


def measure(opener, port, pid):
    """(MiB before, MiB with all connections open)."""
    before = rss_mib(pid)
    connections = opener(port)
    time.sleep(1.0)
    after = rss_mib(pid)
    for connection in connections:
        connection.close()
    time.sleep(1.0)
    return before, after


def main(arguments=()):
    """Runs the comparison; 0 when the bar is met."""
    parse(__doc__, arguments, rounds=1, seconds=0, tools=("nginx", "taskset"))
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < CONNECTIONS + 1000:
        print(f"the limit of open files is {hard}: too low for {CONNECTIONS} connections", file=sys.stderr)
        raise SystemExit(2)
    worst = 0.0
    print(f"{CONNECTIONS} idle connections{'before MiB':>18}{'open MiB':>10}{'KiB each':>10}")
    for side in ("plain", "mTLS"):
        with serving(two_hops, envoy_two_hops) as proxies:
            inbound = proxies.config.sidecars[1].inbound.bind_port
            rows = [("Mesh", proxies.port, inbound, proxies.worker.pid)]
            rows.append(("Envoy", proxies.envoy_port, proxies.envoy_inbound, proxies.envoy.pid))
            for label, plain_port, tls_port, pid in rows:
                if side == "plain":
                    before, after = measure(open_plain, plain_port, pid)
                else:
                    context = client_context(proxies.authority, proxies.directory)
                    before, after = measure(lambda port, context=context: open_tls(port, context), tls_port, pid)
                each = (after - before) * 1024 / CONNECTIONS
                print(f"{label:6}{side:17}{before:>18.1f}{after:>10.1f}{each:>10.1f}")
                if label == "Mesh":
                    worst = max(worst, after)
    return verdict(f"under {MIB_MAX:g} MiB", met=worst < MIB_MAX)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
