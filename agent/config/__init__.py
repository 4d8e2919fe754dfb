"""The agent's configuration: `AgentConfig` holds every default, `load` reads files and flags into one."""

from agent.config.identity import node_id, prepare_data_dir
from agent.config.keys import FLAGS, KEYS, Flag
from agent.config.loader import load
from agent.config.values import PORT_OFF, AgentConfig, RawDefinition

__all__ = ["FLAGS", "KEYS", "PORT_OFF", "AgentConfig", "Flag", "RawDefinition", "load", "node_id", "prepare_data_dir"]
