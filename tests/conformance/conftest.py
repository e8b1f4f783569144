"""Expected failures, and a table of the results by class."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch_suites  # noqa: F401 (first, because it imports torch's suites without their warnings)
from cuda_suites import skip_where_devices_are_missing

OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_where_devices_are_missing(items)
    for item in items:
        reason = getattr(item.module, "EXPECTED_FAILURES", {}).get(item.name)
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    results, seconds = defaultdict(Counter), Counter()
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.nodeid.count("::") == 2:
                suite = report.nodeid.split("::")[1]
                seconds[suite] += report.duration
                results[suite][outcome] += outcome in OUTCOMES
    if not results:
        return
    results["all"] = sum(results.values(), Counter())
    seconds["all"] = sum(seconds.values())
    terminalreporter.section("results by class")
    columns = [outcome for outcome in OUTCOMES if results["all"][outcome]]
    terminalreporter.line(f"{'':40}" + "".join(f"{column:>9}" for column in [*columns, "seconds"]))
    for suite, found in results.items():
        counts = "".join(f"{found[column]:9}" for column in columns)
        terminalreporter.line(f"{suite:40}{counts}{seconds[suite]:9.0f}")
