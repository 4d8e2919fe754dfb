"""Envoy's response flags: short forms, long forms and what they say (envoyproxy docs, "Response flags")."""

# Short form, in what exchanges carry: long form, as RESPONSE_FLAGS_LONG prints it.
LONG_FORMS = {
    "DC": "DownstreamConnectionTermination",
    "DF": "DnsResolutionFailed",
    "DI": "DelayInjected",
    "DO": "DropOverload",
    "DPE": "DownstreamProtocolError",
    "DR": "DownstreamRemoteReset",
    "DT": "DurationTimeout",
    "FI": "FaultInjected",
    "IH": "InvalidEnvoyRequestHeaders",
    "LH": "FailedLocalHealthCheck",
    "LR": "LocalReset",
    "NC": "NoClusterFound",
    "NFCF": "NoFilterConfigFound",
    "NR": "NoRouteFound",
    "OM": "OverloadManagerTerminated",
    "RFCF": "ResponseFromCacheFilter",
    "RL": "RateLimited",
    "RLSE": "RateLimitServiceError",
    "SI": "StreamIdleTimeout",
    "UAEX": "UnauthorizedExternalService",
    "UC": "UpstreamConnectionTermination",
    "UDO": "UnconditionalDropOverload",
    "UF": "UpstreamConnectionFailure",
    "UH": "NoHealthyUpstream",
    "UMSDR": "UpstreamMaxStreamDurationReached",
    "UO": "UpstreamOverflow",
    "UPE": "UpstreamProtocolError",
    "UR": "UpstreamRemoteReset",
    "URX": "UpstreamRetryLimitExceeded",
    "UT": "UpstreamRequestTimeout",
}


def long_form(flags: str) -> str:
    """`URX,UT` in long words, comma-joined in the same order. A flag that is not known stays as it is."""
    return ",".join([LONG_FORMS.get(flag, flag) for flag in flags.split(",")]) if flags else ""
