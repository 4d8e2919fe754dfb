"""Choosing an endpoint of a target: which of them take load at all, then one of them by the target's policy.

`make_balancer` is what callers use. `levels` divides load among priorities, localities and health as Envoy does;
`schedule`, `choices`, `ewma` and `tables` are the policies; `slow_start` ramps weights; `subset` selects by metadata.

A caller's duties: a new set of endpoints, or a changed weight, priority or locality, is a new balancer; when `usable`
changes for any endpoint, `health_changed` is called; `active` counts what an endpoint carries now, the request being
balanced not included; under `peak_ewma` each endpoint has a `PeakEwma` and reports to it.
"""

from mesh.proxy.balancing.balancer import Balancer, check_policy, make_balancer
from mesh.proxy.balancing.candidate import Candidate
from mesh.proxy.balancing.ewma import PeakEwma
from mesh.proxy.balancing.subset import select

__all__ = ["Balancer", "Candidate", "PeakEwma", "check_policy", "make_balancer", "select"]
