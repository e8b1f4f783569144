"""The pytest side: one test per case, one launch for many cases. Imported into the conftest.py of each suite.

A launch runs exactly the cases that pytest selected, when the first of them is due.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence

import harness
import launcher
import psutil
import pytest

GIB = 2**30
LARGE_NEEDS = 12 * GIB

_reports: dict[tuple[str, str], launcher.Reports] = {}  # by backend and launch
_selected: dict[str, list[str]] = {}  # names of cases, by launch


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # two suites in one run: the option is there already
        parser.addoption("--backend", choices=launcher.BACKENDS, help="RPC backend of all multi-rank tests")


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "large: needs several GiB of memory",
        "stress: long; runs only when asked for with -m stress",
        "timeout: limit of pytest-timeout",
    ):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "stress" not in config.getoption("markexpr", ""):
        deselected = [item for item in items if item.get_closest_marker("stress")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def pytest_collection_finish(session: pytest.Session) -> None:
    _selected.clear()
    for item in session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "launch" in parameters and not item.get_closest_marker("skip"):
            names = _selected.setdefault(parameters["launch"], [])
            if parameters["name"] != "end":
                names.append(f"{parameters['module']}:{parameters['name']}")


def pytest_sessionfinish() -> None:
    launcher.close_rank_server()


def _load(module: str) -> None:
    # torch.jit warns that it is deprecated, RPC's TorchScript calls are not, and warnings are errors here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.")
        importlib.import_module(module)


def parametrize_cases(modules: Sequence[str], together: bool = False) -> pytest.MarkDecorator:
    """One test per module, world size and case, and an "end" that checks shutdown and the exit of the launch.

    Args:
        together: whether the cases of all modules share a launch per world size.
    """
    for module in modules:
        _load(module)
    groups = [modules] if together else [[module] for module in modules]
    parameters = [parameter for group in groups for parameter in _case_parameters(group)]
    return pytest.mark.parametrize(("launch", "module", "size", "name"), parameters)


def _case_parameters(modules: Sequence[str]) -> Iterator[object]:
    cases = [(module, case) for module in modules for case in harness.CASES[module].values()]
    for size in sorted({size for _, case in cases for size in case.sizes}):
        launch = f"{' '.join(modules)}, {size} ranks"
        for module, case in cases:
            if size in case.sizes:
                marks = [pytest.mark.large] if case.large else []
                label = f"{module.removeprefix('cases_')}-{size}-{case.name}"
                yield pytest.param(launch, module, size, case.name, id=label, marks=marks)
        label = f"{modules[0].removeprefix('cases_')}-{size}-end" if len(modules) == 1 else f"{size}-end"
        yield pytest.param(launch, modules[0], size, "end", id=label)


def parametrize_programs(modules: Iterable[str]) -> pytest.MarkDecorator:
    """One test per program."""
    for module in modules:
        _load(module)
    return pytest.mark.parametrize(
        ("module", "name"),
        [
            pytest.param(module, name, id=name, marks=[] if program.any_world else [pytest.mark.mpi])
            for module in modules
            for name, program in harness.PROGRAMS[module].items()
        ],
    )


def asked_backend(config: pytest.Config) -> str | None:
    """The backend that all tests are to use, if there is such a one: --backend, else $RPC_TEST_BACKEND."""
    return config.getoption("--backend", None) or os.environ.get("RPC_TEST_BACKEND")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The backend of a test: MPI, under the launcher if the test depends on it, else with the cheaper ranks without."""
    asked = asked_backend(request.config)
    if asked or request.node.get_closest_marker("mpi"):
        return asked or "mpi"
    if launcher.is_open_mpi():
        pytest.skip("Open MPI needs its launcher; --backend mpi runs all tests under it")
    return "mpi-by-store"


@pytest.fixture
def outcome(launch: str, module: str, size: int, name: str, backend: str) -> launcher.Outcome:
    """What became of a case. An error, not a failure, if the launch ended before it."""
    if reason := name != "end" and _reason_to_skip(harness.CASES[module][name], backend):
        pytest.skip(reason)
    key = (backend, launch)
    if key not in _reports:
        names = [other for other in _selected[launch] if not _reason_to_skip(harness.find_case(other), backend)]
        _reports[key] = launcher.run_cases(module, names, size, backend)
    result = _reports[key].outcome(name if name == "end" else f"{module}:{name}")
    if not result.ran:
        pytest.fail(result.error, pytrace=False)
    return result


def _reason_to_skip(case: harness.Case, backend: str) -> str:
    if case.large and _available_memory() < LARGE_NEEDS:
        return f"needs {LARGE_NEEDS // GIB} GiB of free memory"
    if backend == "tensorpipe" and case.tensorpipe:
        return case.tensorpipe
    return "about what the launcher tells" if case.launched and backend != "mpi" else ""


def _available_memory() -> int:
    return psutil.virtual_memory().available  # what is free and what the page cache would give back
