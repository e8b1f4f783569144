"""The pytest side: one test per case, one launch per (module, world size). Imported into the conftest.py of each suite.

A launch runs exactly the cases that pytest selected, when the first of them is due.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterable, Iterator

import harness
import launcher
import psutil
import pytest

GIB = 2**30
LARGE_NEEDS = 12 * GIB

_reports: dict[tuple[str, int], launcher.Report] = {}
_selected: dict[tuple[str, int], list[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # two suites in one run: the option is there already
        parser.addoption("--backend", choices=launcher.BACKENDS, help="RPC backend of the multi-rank tests")


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
        if {"module", "size", "name"} <= parameters.keys() and not item.get_closest_marker("skip"):
            _selected.setdefault((parameters["module"], parameters["size"]), []).append(parameters["name"])


def pytest_sessionfinish() -> None:
    launcher.close_rank_server()


def _load(module: str) -> None:
    # torch.jit warns that it is deprecated, RPC's TorchScript calls are not, and warnings are errors here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.")
        importlib.import_module(module)


def parametrize_cases(modules: Iterable[str]) -> pytest.MarkDecorator:
    """One test per module, world size and case, and an "end" that checks shutdown and the exit of the launch."""
    return pytest.mark.parametrize(("module", "size", "name"), list(_case_parameters(modules)))


def _case_parameters(modules: Iterable[str]) -> Iterator[object]:
    for module in modules:
        _load(module)
        cases = harness.CASES[module].values()
        for size in sorted({size for case in cases for size in case.sizes}):
            for case in cases:
                if size in case.sizes:
                    marks = [pytest.mark.large] if case.large else []
                    label = f"{module.removeprefix('cases_')}-{size}-{case.name}"
                    yield pytest.param(module, size, case.name, id=label, marks=marks)
            yield pytest.param(module, size, "end", id=f"{module.removeprefix('cases_')}-{size}-end")


def parametrize_programs(modules: Iterable[str]) -> pytest.MarkDecorator:
    """One test per program."""
    for module in modules:
        _load(module)
    return pytest.mark.parametrize(
        ("module", "name"),
        [pytest.param(module, name, id=name) for module in modules for name in harness.PROGRAMS[module]],
    )


@pytest.fixture(scope="session")
def backend(pytestconfig: pytest.Config) -> str:
    """The backend under test: --backend, else $RPC_TEST_BACKEND, else MPI."""
    return pytestconfig.getoption("--backend", None) or os.environ.get("RPC_TEST_BACKEND", "mpi")


@pytest.fixture
def outcome(module: str, size: int, name: str, backend: str) -> launcher.Outcome:
    """What became of a case. An error, not a failure, if the launch ended before it."""
    unwanted = {other for other in harness.CASES[module] if _reason_to_skip(harness.CASES[module][other], backend)}
    if name in unwanted:
        pytest.skip(_reason_to_skip(harness.CASES[module][name], backend))
    key = (module, size)
    if key not in _reports:
        names = [other for other in _selected[key] if other != "end" and other not in unwanted]
        _reports[key] = launcher.run_cases(module, size, names, backend)
    result = _reports[key].outcome(name)
    if not result.ran:
        pytest.fail(result.error, pytrace=False)
    return result


def _reason_to_skip(case: harness.Case, backend: str) -> str:
    if case.large and _available_memory() < LARGE_NEEDS:
        return f"needs {LARGE_NEEDS // GIB} GiB of free memory"
    return (case.tensorpipe or "") if backend == "tensorpipe" else ""


def _available_memory() -> int:
    return psutil.virtual_memory().available  # what is free and what the page cache would give back
