"""The `mesh` command line: Consul's verbs, flags, columns and exit statuses, over the HTTP API.

`main` finds the command and imports only its module, so that `mesh version` starts in milliseconds. `flags` makes click
read flags as Go programs do, `client` speaks to an agent, `output` prints.
"""
