"""Service and check definitions, as API bodies and configuration files write them, into model values.

What JSON cannot be read as a definition raises MalformedJson; what reads well but makes no sense raises InvalidRequest.
Both texts are the HTTP 400 body. What Consul accepts and we cannot honour yet is refused by name, never dropped.
"""

from agent.definitions.check import check_definition, check_row
from agent.definitions.proxy import proxy_definition
from agent.definitions.registration import configured_checks, configured_services, service_definition
from agent.definitions.service import ServiceDefinition
from agent.definitions.sidecar import SIDECAR_SUFFIX, with_sidecar_port

__all__ = [
    "SIDECAR_SUFFIX",
    "ServiceDefinition",
    "check_definition",
    "check_row",
    "configured_checks",
    "configured_services",
    "proxy_definition",
    "service_definition",
    "with_sidecar_port",
]
