"""JSON that a command reads from a file or from standard input."""

import json
import sys
from pathlib import Path

from agent.cli.client import Api, Json


def read_json(api: Api, file: str) -> Json:
    """The decoded content of the file, or of standard input for `-`; ends the command when there is none."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except OSError as error:
        api.fail(f"cannot read {file}: {error.strerror}")
    except UnicodeDecodeError as error:
        api.fail(f"{file} is not UTF-8: {error}")
    try:
        value: Json = json.loads(text)
    except ValueError as error:
        api.fail(f"{file} is not JSON: {error}")
    return value
