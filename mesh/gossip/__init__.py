"""SWIM membership on memberlist's wire with Serf's layer on top: pure, deterministic, no I/O."""
