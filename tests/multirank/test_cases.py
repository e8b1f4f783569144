"""Every case of every cases_*.py, at every world size that it names; some of them under MPI's launcher as well."""

from pathlib import Path

import harness
import launcher
import pytest
from multirank_plugin import parametrize_cases

MODULES = sorted(
    path.stem for path in Path(__file__).parent.glob("cases_*.py") if path.stem not in ("cases_exit", "cases_failure")
)

# What is sent in a world is the same whoever started its ranks, and so is what becomes of it in Python. These are about
# transport and sizes, about MPI's own world, and about other threads and processes beside MPI's.
DEPEND_ON_MPI = [
    f"cases_{name}" for name in ("beside", "busy", "calls", "rref", "session", "signals", "tensors", "timeouts")
]

# A launch of many cases is made in the set-up of its first one.
pytestmark = pytest.mark.timeout(1200)


@parametrize_cases(MODULES)
def test_case(outcome: launcher.Outcome) -> None:
    if outcome.error:
        pytest.fail(outcome.error, pytrace=False)


def test_cases_about_the_launcher_run_under_it() -> None:
    about_it = {module for module in MODULES if any(case.launched for case in harness.CASES[module].values())}
    assert about_it
    assert about_it <= set(DEPEND_ON_MPI)


@pytest.mark.mpi
@parametrize_cases(DEPEND_ON_MPI, together=True)
def test_case_under_the_launcher(outcome: launcher.Outcome) -> None:
    if outcome.error:
        pytest.fail(outcome.error, pytrace=False)
