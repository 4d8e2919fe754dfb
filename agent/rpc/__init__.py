"""Calls between agents on the server port: multiplexed, cancellable, every wait with a deadline.

`RpcServer` answers calls and takes Raft messages in; `RpcPool` keeps one connection per server and calls over it;
`agent.raft_transport` sends Raft messages. None of them knows what the payloads mean.
"""

from agent.addresses import Address
from agent.rpc.connection import open_connection
from agent.rpc.pool import RpcPool
from agent.rpc.server import RpcServer

__all__ = ["Address", "RpcPool", "RpcServer", "open_connection"]
