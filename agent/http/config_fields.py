"""Config entries as users write them -> as they are stored: CamelCase names, one form of durations, no unknown field.

Users write CamelCase or snake_case, durations as "10s" or as nanoseconds. Stored is what Consul's Go client can read
back: texts for the timeouts of routers and resolvers, integer nanoseconds everywhere else. The vocabulary is that of
Consul's kinds; what a field means, and whether it is supported, is decided where it takes effect.
"""

import json
from collections.abc import Mapping

from agent.strict_json import Fields, MalformedJson, parse_duration_s
from mesh.errors import InvalidRequest
from mesh.model.config_entry import ConfigEntry
from mesh.model.duration import format_duration
from mesh.state.validation import SINGLETON_NAMES
from mesh.traffic.neutral import SERVICE_TRAFFIC

_TRAFFIC = ("MeshGateway", "Mode", "TransparentProxy", "MutualTLSMode", "Expose", "EnvoyExtensions")

# The fields of each kind, besides Kind, Name, Meta and what is the store's own.
KIND_FIELDS: Mapping[str, tuple[str, ...]] = {
    "service-defaults": (
        *_TRAFFIC, "Protocol", "ExternalSNI", "UpstreamConfig", "Destination", "MaxInboundConnections",
        "LocalConnectTimeoutMs", "LocalRequestTimeoutMs", "BalanceInboundConnections", "RateLimits",
        "MaxRequestHeadersKB",
    ),
    "proxy-defaults": (*_TRAFFIC, "Config", "AccessLogs", "FailoverPolicy", "PrioritizeByLocality"),
    "service-router": ("Routes",),
    "service-splitter": ("Splits",),
    "service-resolver": (
        "DefaultSubset", "Subsets", "Redirect", "Failover", "ConnectTimeout", "RequestTimeout",
        "PrioritizeByLocality", "LoadBalancer",
    ),
    "service-intentions": ("Sources", "JWT"),
    "ingress-gateway": ("TLS", "Listeners", "Defaults"),
    "terminating-gateway": ("Services",),
    "mesh": (
        "TransparentProxy", "AllowEnablingPermissiveMutualTLS", "ValidateClusters", "TLS", "HTTP", "Peering",
    ),
    "exported-services": ("Services",),
    "api-gateway": ("Listeners", "Status"),
    "http-route": ("Parents", "Hostnames", "Rules", "Status"),
    "tcp-route": ("Parents", "Services", "Status"),
    "inline-certificate": ("Certificate", "PrivateKey"),
    "jwt-provider": (
        "JSONWebKeySet", "Issuer", "Audiences", "Locations", "Forwarding", "ClockSkewSeconds", "CacheConfig",
    ),
    "rate-limit": ("Config",),
    SERVICE_TRAFFIC: ("Traffic",),
}  # fmt: skip

# Every field name below the top.
_NESTED = (
    "ALL", "AccessLogs", "Action", "Add", "AddHeader", "Address", "Addresses", "Audiences", "BackOff",
    "BalanceOutboundConnections", "BaseEjectionTime", "BaseInterval", "CAFile", "CacheDuration", "CaseInsensitive",
    "CertFile", "Certificates", "Checks", "ChoiceCount", "CipherSuites", "Conditions", "Config", "ConnectTimeout",
    "ConnectTimeoutMs", "ConsecutiveErrors", "Consumers", "Contains", "Cookie", "CookieConfig", "Datacenter",
    "Datacenters", "Default", "Defaults", "Description", "Destination", "DialedDirectly", "DisableAutoHostRewrite",
    "DisableListenerLogs", "Enabled", "EnforcingConsecutive5xx", "EnvoyClusterJSON", "EnvoyExtensions",
    "EnvoyListenerJSON", "Exact", "Expose", "FetchAsynchronously", "Field", "FieldValue", "Filename", "Filter",
    "Filters", "Forward", "ForwardPayloadHeader", "HTTP", "HashPolicies", "Header", "HeaderName", "Headers", "Host",
    "Hostname", "Hosts", "IdleTimeout", "IgnoreCase", "IncludeTLSVerify", "Incoming", "InstanceLevel", "Interval",
    "Invert", "JSON", "JSONFormat", "JWKS", "JWKSCluster", "JWT", "KeyFile", "Kind", "LeastRequestConfig",
    "LegacyCreateTime", "LegacyID", "LegacyMeta", "LegacyUpdateTime", "Limits", "Listener", "ListenerPort",
    "Listeners", "Local", "LocalPathPort", "Match", "Matches", "MaxConcurrentRequests", "MaxConnections",
    "MaxEjectionPercent", "MaxFailures", "MaxInterval", "MaxPendingRequests", "MaxVersion", "MaximumRingSize",
    "MeshDestinationsOnly", "MeshGateway", "Method", "Methods", "MinVersion", "MinimumRingSize", "Mode", "Name",
    "Namespace", "NumRetries", "OnlyPassing", "OutboundListenerPort", "Outgoing", "Override", "Overrides",
    "PadForwardPayloadHeader", "Parent", "Parents", "Partition", "PassiveHealthCheck", "Path", "PathExact",
    "PathPrefix", "PathRegex", "Paths", "Peer", "PeerThroughMeshGateways", "Permissions", "Policy", "Port",
    "Precedence", "Prefix", "PrefixRewrite", "Present", "Protocol", "Providers", "Query", "QueryParam", "Rate",
    "ReadRate", "Regex", "Regions", "Remote", "Remove", "Required", "Request", "RequestHeaders", "RequestNormalization",
    "RequestTimeout", "RequestTimeoutMs", "RequestsMaxBurst", "RequestsPerSecond", "ResponseFilters",
    "ResponseHeaders", "RetryFilter", "RetryOn", "RetryOnConnectFailure", "RetryOnStatusCodes", "RetryPolicy",
    "RingHashConfig", "Routes", "Rules", "SDS", "SNI", "SamenessGroup", "SanitizeXForwardedClientCert", "SectionName",
    "Service", "ServiceSubset", "Services", "Session", "Set", "Size", "SourceIP", "Sources", "Splits", "Subset",
    "Subsets", "Suffix", "TLS", "TTL", "TargetRefs", "Targets", "Terminal", "TextFormat", "TimeoutFilter", "Type",
    "URI", "URLRewrite", "UseFor", "Value", "ValuePrefix", "VerifyClaims", "Weight", "WriteRate", "Arguments",
    "CaCertificateProviderInstance", "CertificateName", "DefaultForFailover", "DiscoveryType", "EnvironmentVariable",
    "IncludeLocal", "InlineBytes", "InlineString", "InstanceName", "LastTransitionTime", "Members", "Message",
    "ParsedFromCheck", "Reason", "Resource", "RetryPolicyBackOff", "TLSCertificates", "TLSMaxVersion",
    "TLSMinVersion", "TrustedCA", "UseSNI", "ConsulVersion", "EnvoyVersion",
    "InsertBeforeLocation", "InsecureDisablePathNormalization", "MergeSlashes",
    "PathWithEscapedSlashesAction", "HeadersWithUnderscoresAction", "CertResource", "ClusterName",
)  # fmt: skip

# Stored as they are.
_OPAQUE = frozenset(("Config", "Meta", "LegacyMeta", "Add", "Set", "Arguments", "JSONFormat", "Traffic"))
_FREE_NAMES = frozenset(("Subsets", "Failover"))  # the names below are the user's, the values are not
_DURATIONS = frozenset(
    ("ConnectTimeout", "RequestTimeout", "IdleTimeout", "Interval", "BaseEjectionTime", "TTL", "CacheDuration",
     "BaseInterval", "MaxInterval")
)  # fmt: skip
_TEXT_DURATIONS = frozenset(("ConnectTimeout", "RequestTimeout", "IdleTimeout"))
_TEXT_DURATION_KINDS = frozenset(("service-router", "service-resolver"))
_STORE_FIELDS = ("Namespace", "Partition", "Hash", "CreateIndex", "ModifyIndex", "Locality")
_ALL = {name.lower(): name for fields in (*KIND_FIELDS.values(), _NESTED) for name in fields}


def config_entry(body: object) -> ConfigEntry:
    """The entry in a PUT body. Raises MalformedJson for an unknown field or bad duration, InvalidRequest."""
    if not isinstance(body, dict):
        raise MalformedJson("a config entry is an object with Kind and Name")
    kind = next((value for key, value in body.items() if key.lower() == "kind"), None)
    if not isinstance(kind, str) or not kind:
        raise InvalidRequest("Request decoding failed: Payload does not contain a Kind/kind key at the top level")
    own = KIND_FIELDS.get(kind)
    if own is None:
        raise InvalidRequest(f"Request decoding failed: invalid config entry kind: {kind}")
    fields = Fields(body, ("Kind", "Name", "Meta", *own, *_STORE_FIELDS))
    for name in ("Namespace", "Partition"):
        if fields.text(name) not in ("", "default"):
            raise InvalidRequest(f"Invalid {name.lower()} {fields.text(name)!r}: there is only the default one")
    canonical = _Canonical(text_durations=kind in _TEXT_DURATION_KINDS)
    entry_body = {
        name: canonical.value(name, fields.raw(name))
        for name in own
        if name in fields and not _is_empty(fields.raw(name))
    }
    name = fields.text("Name") or SINGLETON_NAMES.get(kind, "")  # Go's client leaves the one name of some kinds out
    return ConfigEntry(kind=kind, name=name, body=entry_body, meta=fields.text_map("Meta"))


def canonical_fields(value: object) -> object:
    """A fragment, such as one of an intention's Permissions, with its field names and durations as they are stored.

    Raises MalformedJson for an unknown field or a bad duration.
    """
    return _Canonical(text_durations=False).value("", value)


def _is_empty(value: object) -> bool:
    """Go's clients send zero values for what their user never set."""
    return value in (None, "", 0, False) or value in ([], {})


class _Canonical:
    """Rewrites values below an entry's own fields."""

    def __init__(self, *, text_durations: bool) -> None:
        self._text_durations = text_durations

    def value(self, field: str, value: object) -> object:
        """The value of a field, as it is stored. Raises MalformedJson."""
        if field in _OPAQUE:
            return value
        if field in _DURATIONS:
            return self._duration(field, value)
        if isinstance(value, list):
            return [self.value(field, item) for item in value]
        if not isinstance(value, dict):
            return value
        if field in _FREE_NAMES:
            return {name: self.value("", inner) for name, inner in value.items()}
        result: dict[str, object] = {}
        for key, inner in value.items():
            name = _ALL.get(key.replace("_", "").lower())
            if name is None:
                raise MalformedJson(f"json: unknown field {json.dumps(key)}")
            if name in result:
                raise MalformedJson(f"json: field {name} is given twice")
            if inner is not None:
                result[name] = self.value(name, inner)
        return result

    def _duration(self, field: str, value: object) -> object:
        if value in ("", None):
            return value
        try:
            duration_s = parse_duration_s(value)
        except MalformedJson as error:
            raise MalformedJson(f"{field}: {error}") from None
        if self._text_durations and field in _TEXT_DURATIONS:
            return format_duration(duration_s)
        return round(duration_s * 1e9)
