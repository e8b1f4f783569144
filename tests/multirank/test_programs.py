"""Every program, in a launch of its own."""

import re

import harness
import launcher
import pytest
from multirank_plugin import parametrize_programs

pytestmark = pytest.mark.timeout(300)


@parametrize_programs(
    [
        "cases_drop_in",
        "cases_exit",
        "cases_failure",
        "cases_main",
        "cases_pickling",
        "cases_signals",
        "device_programs",
    ]
)
def test_program(module: str, name: str, backend: str) -> None:
    program = harness.PROGRAMS[module][name]
    if backend == "tensorpipe" and program.tensorpipe:
        pytest.skip(program.tensorpipe)
    if backend == "mpi" and program.launcherless:
        pytest.skip("about ranks without MPI's launcher")
    if program.skip:
        pytest.skip(program.skip)
    status, output = launcher.run_program(module, name, backend)
    problems = [f"no match of {pattern!r} in" for pattern in program.expect if not re.search(pattern, output)]
    problems += [f"a match of {pattern!r} in" for pattern in program.forbid if re.search(pattern, output)]
    if status is None:
        problems.append("had to be ended after")
    elif program.succeeds not in (None, status == 0) or program.status not in (None, status):
        problems.append(f"ended with status {status} after")
    if problems:
        pytest.fail(", ".join(problems) + f" the output:\n{output[-20000:]}", pytrace=False)
