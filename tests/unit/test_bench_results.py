"""What the benchmark makes of its measurements. The measurements themselves: tests/multirank/test_bench.py."""

import json
import re
from pathlib import Path

import pytest

from torch_rpc_mpi.bench import plots, report
from torch_rpc_mpi.bench.cases import CASES
from torch_rpc_mpi.bench.results import Report, Result, Starts, percentile
from torch_rpc_mpi.bench.world import Start, Turn


def result_of(name: str, size: int = 2, **medians: list[float]) -> Result:
    result = Result(CASES[name], size)
    for backend, values in medians.items():
        for value in values:
            result.add(backend, Turn([value, value * 0.9, value * 1.1], {0: 1 << 20, 1: 2 << 20}))
    return result


def test_percentiles_lie_between_neighbours_in_proportion() -> None:
    values = [1.0, 2.0, 4.0]
    assert [percentile(values, percent) for percent in (0, 25, 50, 75, 100)] == [1, 1.5, 2, 3, 4]
    assert percentile([7.0], 99) == 7


def test_ratios_are_those_of_the_same_round() -> None:
    # The machine was half as fast in each round as in the one before; the ratio has always been 2.
    comparison = result_of(
        "builtin", mpi=[1.0, 2.0, 4.0, 8.0, 16.0], tensorpipe=[2.0, 4.0, 8.0, 16.0, 32.0]
    ).comparison("tensorpipe")
    assert (comparison.ratio, comparison.low, comparison.high) == (2, 2, 2)
    assert comparison.conclusive


@pytest.mark.parametrize(
    ("theirs", "conclusive"),
    [
        ([0.5, 0.6, 1.5, 1.6, 2.0], False),
        ([1.5, 1.6, 1.7, 1.8, 2.0], True),
        ([0.5, 0.6, 0.6, 0.6, 0.7], True),
        ([2.0, 2.0, 2.0, 2.0], False),
    ],
    ids=["both sides of 1", "faster", "slower", "too few rounds"],
)
def test_noise_larger_than_the_difference_allows_no_conclusion(theirs: list[float], conclusive: bool) -> None:
    found = result_of("builtin", mpi=[1.0] * len(theirs), tensorpipe=theirs)
    assert found.comparison("tensorpipe").conclusive == conclusive


def test_rates_count_the_calls_of_all_callers() -> None:
    assert result_of("builtin").calls() == 1
    assert result_of("async_udf_100", 4).calls() == 100
    assert result_of("many_to_one", 4).calls() == 3 * CASES["many_to_one"].calls
    assert result_of("neighbours", 4).calls() == 4
    assert result_of("all_to_all", 4).calls() == 16


def full_report() -> Report:
    results = [
        result_of("builtin", mpi=[3e-5] * 5, tensorpipe=[3e-4] * 5, raw=[3e-6] * 5),
        result_of("echo_1MiB", mpi=[4e-4, 4e-4, 3e-4, 2e-4, 2e-4], tensorpipe=[1e-3] * 5, raw=[3e-4] * 5),
        result_of("echo_16MiB", mpi=[5e-3] * 5, raw=[6e-3] * 5),
        result_of("async_udf_100", mpi=[2e-3] * 5, tensorpipe=[2e-2] * 5),
        result_of("async_udf_1024", mpi=[2e-2] * 5, tensorpipe=[2e-1] * 5),
        result_of("idle", mpi=[0.002] * 5, tensorpipe=[0.9] * 5),
        *(result_of("session", size, mpi=[0.1 * size] * 5) for size in (2, 4)),
    ]
    starts = {
        size: Starts(
            {
                "mpi": [Start(factor * size, 0.01, 0.05, 0.1) for factor in (0.3, 0.1, 0.05)],
                "tensorpipe": [Start(1.0, 0.1, None, 0.5)],
            }
        )
        for size in (2, 4)
    }
    failures = {4: {"tensorpipe": "first call: 2 of 4 ranks failed; [rank 3]: RuntimeError: gone"}}
    return Report(["mpi", "tensorpipe", "raw"], results, starts, failures, ["echo_1GiB left out"])


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(full_report())
    text = capsys.readouterr().out
    for expected in (
        r"rpc_sync, builtin +30 µs \(27 µs-33 µs\) +300 µs .*10\.00 \(10\.00-10\.00\)",
        r"1 MiB, there and back .* no conclusion \(0\.75-1\.50\)",
        r"empty function, 100 at once +50,000/s",
        r"idle, share of a core +0\.20 %",
        r"4 +mpi +3 +50 ms +400 ms +10 ms +100 ms",
        r"4 +tensorpipe +1 +1\.00 s +100 ms +500 ms +1\.15 \(1\.15-1\.15\)",
        r"1 MiB, there and back +2 +1, 2 +1, 2",
        r"tensorpipe failed in a world of 4 ranks. first call: 2 of 4 ranks failed; \[rank 3\]: RuntimeError: gone",
        r"echo_1GiB left out",
    ):
        assert re.search(expected, text), f"no {expected!r} in\n{text}"


def test_a_world_that_never_started_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(Report(["mpi"], starts={128: Starts()}, failures={128: {"mpi": "only 100 of 128 processes came"}}))
    assert "mpi failed in a world of 128 ranks. only 100 of 128 processes came" in capsys.readouterr().out


def test_json_has_all_that_was_measured() -> None:
    found = json.loads(json.dumps(full_report().as_json()))
    builtin = found["results"][0]
    assert (builtin["case"], builtin["ranks"], builtin["calls"], builtin["unit"]) == ("builtin", 2, 1, "s")
    theirs = builtin["backends"]["tensorpipe"]
    assert theirs["medians"] == [3e-4] * 5
    assert len(theirs["percentiles"]) == 101
    assert theirs["percentiles"][50] == pytest.approx(3e-4)
    assert theirs["mpi_is_faster"]["ratio"] == pytest.approx(10)
    assert theirs["mpi_is_faster"]["conclusive"]
    assert theirs["grown_bytes"] == {"0": 1 << 20, "1": 2 << 20}
    starts = found["starts"]["4"]
    assert starts["mpi"]["medians"] == {"init": 0.4, "calls": 0.01, "mpi_init": 0.05, "shutdown": 0.1}
    assert [start["init"] for start in starts["mpi"]["rounds"]] == [1.2, 0.4, 0.2]
    assert starts["tensorpipe"]["mpi_is_faster"]["ratio"] == pytest.approx(1.5 / 1.3)
    assert list(found["failures"]) == ["4"]


def test_plots_of_what_there_is(tmp_path: Path) -> None:
    names = ("latency", "bandwidth", "rate", "start")
    files = plots.save(full_report(), tmp_path)
    assert {file.name for file in files} == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert all(file.stat().st_size > 5000 for file in files)
    assert plots.save(Report(["mpi"], [result_of("idle", mpi=[0.002] * 5)]), tmp_path) == []


def test_every_case_says_what_it_is() -> None:
    titles = [case.title for case in CASES.values()]
    assert len(set(titles)) == len(titles)
    assert any(case.quick for case in CASES.values())
