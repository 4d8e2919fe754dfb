"""The values the control plane speaks of: frozen, compared by content, encoded by `mesh.wire`.

Rows that the store keeps carry `create_index` and `modify_index`: the Raft index of the entry that created and last
changed them. Values on their way in leave both at 0.
"""
