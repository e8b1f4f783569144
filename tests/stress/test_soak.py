"""The soak, a minute of it in `make test`; `make soak` makes more calls and shows what they came to."""

import harness
import launcher
import pytest
from multirank_plugin import parametrize_cases

soak = parametrize_cases(["cases_soak"])

pytestmark = pytest.mark.timeout(harness.find_case("cases_soak:soak").limit + 120)


@soak
def test_soak(outcome: launcher.Outcome) -> None:
    print("\n".join(line for line in outcome.output.splitlines() if line.startswith("soak: ")))
    if outcome.error:
        pytest.fail(outcome.error, pytrace=False)
