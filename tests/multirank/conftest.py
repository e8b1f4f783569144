"""Makes the rank programs and their helpers importable, and lets pytest collect them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from multirank_plugin import *  # noqa: F403 (hooks and fixtures)
