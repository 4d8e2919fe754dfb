"""The data plane: `supervisor` and `control` on the agent's side; `worker` and its parts in a process of their own."""
