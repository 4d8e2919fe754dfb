"""`AccessLogs` of proxy-defaults, as Consul's users write it."""

import pytest

from agent.sidecar_render import access_log
from mesh.model.config_entry import ConfigEntry
from mesh.proxy.sidecar_config import AccessLogConfig


def rendered(settings):
    warnings = []
    return access_log(ConfigEntry("proxy-defaults", "global", {"AccessLogs": settings}), warnings), warnings


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({}, AccessLogConfig()),
        ({"Enabled": False, "Type": "file", "Path": "/a"}, AccessLogConfig()),
        ({"Enabled": True}, AccessLogConfig("/dev/stdout", json_format="consul")),
        ({"Enabled": True, "Type": "stdout", "TextFormat": "x"}, AccessLogConfig("/dev/stdout", "x")),
        ({"Enabled": True, "Type": "stderr", "JSONFormat": "{}"}, AccessLogConfig("/dev/stderr", "", "{}")),
        ({"Enabled": True, "Type": "file", "Path": "/a"}, AccessLogConfig("/a", json_format="consul")),
        ({"Enabled": True, "Type": "otlp", "DisableListenerLogs": True}, AccessLogConfig("otlp", json_format="consul")),
    ],
)
def test_the_entry_says_where_lines_go_and_how_they_look(settings, config):
    assert rendered(settings) == (config, [])
    assert access_log(None, []) == AccessLogConfig()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"Type": "file"}, "has no Path"), ({"Type": "syslog"}, "is of the unknown type 'syslog'")],
)
def test_what_cannot_be_logged_is_said(settings, reason):
    config, warnings = rendered({"Enabled": True, **settings})
    assert config.path == ""
    assert warnings == [f"proxy-defaults: the access log {reason}, so nothing is logged"]
