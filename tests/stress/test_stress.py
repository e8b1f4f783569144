"""Long random load. Run with `pytest tests/stress -m stress`; $RPC_STRESS_SECONDS sets the length of each case."""

import launcher
import pytest
from multirank_plugin import parametrize_cases

pytestmark = [pytest.mark.mpi, pytest.mark.stress, pytest.mark.timeout(3600)]


@parametrize_cases(["cases_storm"])
def test_storm(outcome: launcher.Outcome) -> None:
    if outcome.error:
        pytest.fail(outcome.error, pytrace=False)
