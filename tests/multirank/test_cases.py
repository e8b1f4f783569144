"""Every case of every cases_*.py, at every world size that it names."""

from pathlib import Path

import launcher
import pytest
from multirank_plugin import parametrize_cases

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py") if path.stem != "cases_exit")

# A launch of many cases is made in the set-up of its first one.
pytestmark = pytest.mark.timeout(1200)


@parametrize_cases(MODULES)
def test_case(outcome: launcher.Outcome) -> None:
    if outcome.error:
        pytest.fail(outcome.error, pytrace=False)
