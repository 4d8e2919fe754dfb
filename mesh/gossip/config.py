"""Every constant of the gossip protocol that an operator or a profile may change, in one frozen value."""

from dataclasses import dataclass, replace

from mesh.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GossipConfig:
    """Timing and sizes of one gossip pool; the defaults are memberlist's LAN profile with Consul's overrides.

    Raises ConfigError when the values contradict each other. All times are seconds.
    """

    probe_interval_s: float = 1.0
    probe_timeout_s: float = 0.5
    indirect_probes: int = 3
    tcp_probe: bool = True
    # Lifeguard has the relay answer before the asker gives up; memberlist waits the whole timeout, so its nack is late.
    nack_fraction: float = 0.8
    suspicion_multiplier: int = 4
    suspicion_max_multiplier: int = 6
    awareness_score_max: int = 8
    retransmit_multiplier: int = 4
    gossip_interval_s: float = 0.2
    gossip_nodes: int = 3
    gossip_to_the_dead_s: float = 30.0
    dead_reclaim_s: float = 30.0
    push_pull_interval_s: float = 30.0
    stream_timeout_s: float = 10.0
    reconnect_interval_s: float = 30.0
    reconnect_timeout_s: float = 72 * 3600.0
    tombstone_timeout_s: float = 24 * 3600.0
    reap_interval_s: float = 15.0
    recent_intent_s: float = 300.0
    broadcast_timeout_s: float = 5.0
    leave_propagate_s: float = 3.0
    # Below the smallest common path MTU with IPv6 and UDP headers taken off.
    packet_bytes_max: int = 1400
    queue_depth_min: int = 4096
    # A stall of the event loop longer than this counts against our own health (Lifeguard's local health).
    stall_s: float = 0.1
    label: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.probe_timeout_s < self.probe_interval_s:
            raise ConfigError(
                f"gossip probe_timeout ({self.probe_timeout_s} s) must be positive and below "
                f"probe_interval ({self.probe_interval_s} s)"
            )
        if self.gossip_interval_s <= 0 or self.push_pull_interval_s <= 0 or self.reap_interval_s <= 0:
            raise ConfigError("gossip_interval, push_pull_interval and reap_interval must be positive")
        if self.suspicion_multiplier < 1 or self.retransmit_multiplier < 1 or self.gossip_nodes < 1:
            raise ConfigError("gossip suspicion_mult, retransmit_mult and gossip_nodes must be at least 1")
        # An alive message carries up to 512 bytes of tags and must fit in one packet with its envelope.
        if not 1000 <= self.packet_bytes_max <= 65_000:
            raise ConfigError(f"gossip packet size {self.packet_bytes_max} is outside 1000..65000 bytes")
        if len(self.label.encode()) > 253:
            raise ConfigError("gossip label is longer than 253 bytes")


LAN = GossipConfig()
WAN = GossipConfig(
    probe_interval_s=5.0,
    probe_timeout_s=3.0,
    suspicion_multiplier=6,
    gossip_interval_s=0.5,
    gossip_nodes=4,
    gossip_to_the_dead_s=60.0,
    push_pull_interval_s=60.0,
    stream_timeout_s=30.0,
)
# A single-machine agent started with -dev: rumours at once, no waiting for peers on the way out.
DEV = replace(LAN, gossip_interval_s=0.1, push_pull_interval_s=15.0, leave_propagate_s=0.0, stream_timeout_s=3.0)
# Fast real-time tests on loopback.
TEST = GossipConfig(
    probe_interval_s=0.1,
    probe_timeout_s=0.05,
    gossip_interval_s=0.02,
    gossip_to_the_dead_s=3.0,
    dead_reclaim_s=3.0,
    push_pull_interval_s=1.0,
    stream_timeout_s=1.0,
    reconnect_interval_s=1.0,
    reap_interval_s=0.5,
    broadcast_timeout_s=0.5,
    leave_propagate_s=0.2,
)
