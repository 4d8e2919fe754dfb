"""Calls between agents on the server port: multiplexed, cancellable, every wait with a deadline.

`RpcServer` answers calls and takes Raft messages in; `RpcPool` keeps one connection per server and calls over it;
`agent.raft_transport` sends Raft messages. `frames` is the wire; `calls` is what agents ask of servers, and the only
module here that knows what a payload means.
"""

from agent.addresses import Address
from agent.rpc.connection import open_connection
from agent.rpc.pool import RpcPool
from agent.rpc.server import RpcServer

__all__ = ["Address", "RpcPool", "RpcServer", "open_connection"]
