"""The stress tests use the harness of the multi-rank tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "multirank"))
sys.path.insert(0, str(Path(__file__).parent))

from multirank_plugin import *  # noqa: F403 (hooks and fixtures)
