"""One worker for a whole test module, and a client and an application that the test plays itself, on real sockets."""

import contextlib
import socket
import threading

from peers import TIMEOUT_S, Peer
from sidecars import Authority, WorkerProcess, loopback_address

from agent.dataplane.control import Ack
from agent.tls import client_context


class Hops:
    """One configuration being served: ports, and the application's listening socket."""

    def __init__(self, pair, *, protocol="http", target=None, **inbound):
        self.pair = pair
        self.address = loopback_address()
        self.outbound_port, self.inbound_port, self.app_port = 9191, 21000, 8080
        self.listener = socket.create_server((self.address, self.app_port))
        self.listener.settimeout(TIMEOUT_S)
        self._protocol = protocol
        self._target = target
        self._peers = [self.listener]
        self.apply(**inbound)

    def apply(self, *, target=None, **inbound):
        config = self.pair.authority.two_hops(
            outbound_port=self.outbound_port,
            inbound_port=self.inbound_port,
            app_port=self.app_port,
            address=self.address,
            protocol=self._protocol,
            version=self.pair.next_version(),
            target=target or self._target,
            **inbound,
        )
        reply = self.pair.worker.configure(config)
        assert reply == Ack(config.version), reply
        return config

    def client(self):
        peer = Peer(socket.create_connection((self.address, self.outbound_port), TIMEOUT_S))
        self._peers.append(peer)
        return peer

    def app(self):
        sock, _address = self.listener.accept()
        peer = Peer(sock)
        self._peers.append(peer)
        return peer

    def serve(self, answer=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"):
        """From now on the application answers every head (of bodiless requests) by itself."""

        def serve_one(sock):
            peer = Peer(sock)
            with contextlib.suppress(OSError, AssertionError):
                while True:
                    peer.read_head()
                    peer.send(answer)
            peer.close()

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    sock, _address = self.listener.accept()
                    threading.Thread(target=serve_one, args=(sock,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def tls_client(self, service="web", *, leaf=None, authority=None):
        """Straight to the inbound listener, as another sidecar would."""
        authority = authority or self.pair.authority
        context = client_context(*(leaf or authority.leaf(service)), (self.pair.authority.root.root_cert_pem,))
        sock = socket.create_connection((self.address, self.inbound_port), TIMEOUT_S)
        self._peers.append(sock)
        peer = Peer(context.wrap_socket(sock))
        self._peers.append(peer)
        return peer

    def close(self):
        for peer in self._peers:
            peer.close()


class Pair:
    """The module's worker."""

    def __init__(self, directory, **options):
        self.authority = Authority()
        self.worker = WorkerProcess(directory, **options)
        self._version = 0
        self._open = []

    def next_version(self):
        self._version += 1
        return self._version

    def hops(self, **arguments):
        hops = Hops(self, **arguments)
        self._open.append(hops)
        return hops

    def end_test(self):
        """Handlers must not have raised, whatever the test did."""
        for hops in self._open:
            hops.close()
        self._open.clear()
        log = self.worker.log.read_text()
        assert self.worker.counter("mesh_worker_handler_faults") == 0, log
        assert self.worker.process.poll() is None, log

    def close(self):
        self.worker.close()
