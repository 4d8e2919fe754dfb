"""Speed and memory, each against a real peer on the same machine in the same run: `make bench`."""

import sys
from pathlib import Path

# How real processes are started is written once, beside the tests.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
