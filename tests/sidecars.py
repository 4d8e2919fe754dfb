"""Real workers for tests and benchmarks: identities from our own CA, a process, and a control connection."""

import os
import random
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.dataplane.control import REPLIES, Configure, Drain, Ping, Stats, frame
from mesh.ca import authority
from mesh.ca.leaf import create_csr
from mesh.names import service_spiffe_id
from mesh.proxy.sidecar_config import (
    EndpointConfig,
    InboundListener,
    OutboundListener,
    SidecarConfig,
    TargetConfig,
    WorkerConfig,
)

_RNG = random.Random()
REPOSITORY = Path(__file__).resolve().parent.parent


class Authority:
    """A CA of its own, with leaves for services."""

    def __init__(self, cluster_id="11111111-2222-3333-4444-555555555555"):
        self.trust_domain = authority.trust_domain(cluster_id)
        now = time.time()
        self.root = authority.create_root(
            ec.generate_private_key(ec.SECP256R1()),
            cluster_id=cluster_id,
            serial_number=_RNG.getrandbits(62) | 1,
            not_before_s=now - 60,
            not_after_s=now + 3600,
        )
        self._signing_key = authority.load_signing_key(self.root)

    def spiffe_id(self, service):
        return str(service_spiffe_id(self.trust_domain, "dc1", service))

    def leaf(self, service, *, not_before_s=None, not_after_s=None):
        """(certificate chain PEM, key PEM)."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = time.time()
        issued = authority.sign_csr(
            self.root,
            self._signing_key,
            create_csr(key, service_spiffe_id(self.trust_domain, "dc1", service)),
            datacenter="dc1",
            serial_number=_RNG.getrandbits(62) | 1,
            not_before_s=now - 60 if not_before_s is None else not_before_s,
            not_after_s=now + 3000 if not_after_s is None else not_after_s,
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return issued.certificate_pem, pem.decode()

    def sidecar(self, service, *, inbound=None, outbound=(), leaf=None, **fields):
        chain, key = leaf or self.leaf(service)
        return SidecarConfig(
            proxy_id=fields.pop("proxy_id", f"{service}-sidecar-proxy"),
            service=service,
            datacenter="dc1",
            trust_domain=self.trust_domain,
            spiffe_id=self.spiffe_id(service),
            certificate_chain_pem=chain,
            private_key_pem=key,
            trust_roots_pem=(self.root.root_cert_pem,),
            inbound=inbound,
            outbound=tuple(outbound),
            **fields,
        )

    def two_hops(
        self, *, outbound_port, inbound_port, app_port, address="127.0.0.1", protocol="http", version=1, target=None,
        **inbound,
    ):  # fmt: skip
        """web's outbound listener, api's inbound one, the application behind it: both sidecars in one worker."""
        inbound.setdefault("default_allow", True)
        target = {
            "endpoints": (EndpointConfig("api-1", address, inbound_port),),
            "expected_spiffe_ids": (self.spiffe_id("api"),),
            **(target or {}),
        }
        outbound = OutboundListener(address, outbound_port, TargetConfig("api", **target), protocol)
        public = InboundListener(address, inbound_port, address, app_port, protocol, **inbound)
        return WorkerConfig(version, (self.sidecar("web", outbound=[outbound]), self.sidecar("api", inbound=public)))


class WorkerProcess:
    """`python -m agent.dataplane.worker` and our control connection to it."""

    def __init__(self, directory, *, exit_with_agent=False, affinity=None, descriptors=None):
        self.path = Path(directory) / "worker.sock"
        command = [sys.executable, "-m", "agent.dataplane.worker", "--control", str(self.path)]
        if exit_with_agent:
            command.append("--exit-with-agent")
        if affinity is not None:
            command = ["taskset", "-c", str(affinity), *command]
        if descriptors is not None:
            command = ["prlimit", f"--nofile={descriptors}:{descriptors}", *command]
        self.log = Path(directory) / "worker.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stderr=log)
        self._control = None
        self._buffer = b""
        self.connect()

    def connect(self, *, within_s=20.0):
        deadline = time.monotonic() + within_s
        while True:
            self._buffer = b""
            self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._control.settimeout(20)
            try:
                self._control.connect(str(self.path))
            except OSError:
                self._control.close()
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the worker did not start: {self.log.read_text()}") from None
                time.sleep(0.01)
            else:
                return

    def disconnect(self):
        self._control.close()

    def _receive(self, count):
        while len(self._buffer) < count:
            data = self._control.recv(65536)
            if not data:
                raise EOFError("the worker closed the control connection")
            self._buffer += data
        result, self._buffer = self._buffer[:count], self._buffer[count:]
        return result

    def receive_reply(self):
        (length,) = struct.unpack(">I", self._receive(4))
        return REPLIES.decode(self._receive(length))

    def ask(self, request):
        self._control.sendall(frame(request))
        return self.receive_reply()

    def ask_with_sockets(self, request, sockets):
        socket.send_fds(self._control, [frame(request)], [sock.fileno() for sock in sockets])
        return self.receive_reply()

    def ask_for_sockets(self, request):
        """(reply, the sockets that came with it)."""
        self._control.sendall(frame(request))
        self._buffer, numbers, _flags, _address = socket.recv_fds(self._control, 65536, 200)
        return self.receive_reply(), [socket.socket(fileno=number) for number in numbers]

    def configure(self, config):
        return self.ask(Configure(config))

    def ping(self):
        return self.ask(Ping())

    def counters(self):
        return self.ask(Stats()).counters

    def counter(self, name):
        """The sum over all label sets."""
        return sum(value for key, value in self.counters().items() if key == name or key.startswith(name + "{"))

    def drain(self, deadline_s=5.0):
        return self.ask(Drain(deadline_s))

    @property
    def pid(self):
        return self.process.pid

    def rss_bytes(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def close(self):
        if self._control is not None:
            self._control.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def loopback_address():
    """An address of 127.0.0.0/8 that nobody else on this machine uses: whole port ranges without a collision."""
    return f"127.{_RNG.randrange(1, 255)}.{_RNG.randrange(1, 255)}.{_RNG.randrange(1, 255)}"


def free_ports(count):
    """Ports of 127.0.0.1 that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def cpu_seconds(pid):
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
