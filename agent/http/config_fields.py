"""Config entries as users write them -> as they are stored: CamelCase names, durations as Go texts, no unknown field.

Users write CamelCase or snake_case, durations as "10s" or as nanoseconds. The vocabulary is that of Consul's kinds;
what a field means, and whether it is supported, is decided where it takes effect.
"""

from collections.abc import Mapping

from agent.strict_json import Fields, MalformedJson, format_duration, parse_duration_s
from mesh.errors import InvalidRequest
from mesh.model.config_entry import ConfigEntry

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
    "ConsulVersion", "EnvoyVersion", "InsertBeforeLocation", "InsecureDisablePathNormalization", "MergeSlashes",
    "PathWithEscapedSlashesAction", "HeadersWithUnderscoresAction", "CertResource", "ClusterName",
)  # fmt: skip

_OPAQUE = frozenset(("Config", "Meta", "LegacyMeta", "Add", "Set", "Arguments", "JSONFormat"))  # stored as they are
_FREE_NAMES = frozenset(("Subsets", "Failover"))  # the names below are the user's, the values are not
_DURATIONS = frozenset(
    ("ConnectTimeout", "RequestTimeout", "IdleTimeout", "Interval", "BaseEjectionTime", "TTL", "CacheDuration",
     "BaseInterval", "MaxInterval")
)  # fmt: skip
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
    entry_body = {
        name: _canonical(name, fields.raw(name)) for name in own if name in fields and not _is_empty(fields.raw(name))
    }
    return ConfigEntry(kind=kind, name=fields.text("Name"), body=entry_body, meta=fields.text_map("Meta"))


def canonical_fields(value: object) -> object:
    """A fragment, such as one of an intention's Permissions, with its field names and durations as they are stored.

    Raises MalformedJson for an unknown field or a bad duration.
    """
    return _canonical("", value)


def _is_empty(value: object) -> bool:
    """Go's clients send zero values for what their user never set."""
    return value in (None, "", 0, False) or value in ([], {})


def _canonical(field: str, value: object) -> object:
    if field in _OPAQUE:
        return value
    if field in _DURATIONS:
        return value if value in ("", None) else format_duration(parse_duration_s(value))
    if isinstance(value, list):
        return [_canonical(field if field not in _FREE_NAMES else "", item) for item in value]
    if not isinstance(value, dict):
        return value
    if field in _FREE_NAMES:
        return {name: _canonical("", inner) for name, inner in value.items()}
    result: dict[str, object] = {}
    for key, inner in value.items():
        name = _ALL.get(key.replace("_", "").lower())
        if name is None:
            raise MalformedJson(f'json: unknown field "{key}"')
        if name in result:
            raise MalformedJson(f"json: field {name} is given twice")
        if inner is not None:
            result[name] = _canonical(name, inner)
    return result
