"""The plots, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from .case import GIB, text_of
from .report import seconds_text
from .results import PERCENTS, Report, Result

_TITLES = {
    "mpi": "RPC over MPI",
    "tensorpipe": "TensorPipe",
    "tensorpipe-uv": "TensorPipe (uv)",
    "raw": "MPI itself",
    "limit": "the devices' copies",
}
_COLORS = {"mpi": "#1f6fb4", "tensorpipe": "#d9652b", "tensorpipe-uv": "#b88a1b", "raw": "#707070", "limit": "#707070"}


def save(report: Report, directory: Path) -> list[Path]:
    """Writes those plots for which something was measured; returns the files."""
    files = []
    for draw in (latency, bandwidth, rate, start):
        figure = draw(report)
        if figure is None:
            continue
        for suffix in ("png", "svg"):
            path = directory / f"{draw.__name__}.{suffix}"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            files.append(path)
        pyplot.close(figure)
    return files


def latency(report: Report) -> Any:
    """How many calls ended within which time."""
    found = [result for name in ("builtin", "udf", "remote", "self") if (result := report.of(name))]

    def draw(axes: Any, result: Result, backend: str) -> None:
        values = [result.percentile(backend, percent) for percent in PERCENTS]
        axes.semilogx(values, PERCENTS, color=_COLORS[backend], label=_TITLES[backend])

    panels = [(result.case.title, result, draw) for result in found]
    figure = _panels(report, panels, "seconds", "calls that took no longer")
    for axes in figure.axes if figure else ():
        axes.yaxis.set_major_formatter(PercentFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))
        axes.tick_params("x", labelrotation=30)
    return figure


def bandwidth(report: Report) -> Any:
    """Bytes that went, there and back if they did, by the time that they took."""

    def draw(axes: Any, prefix: str, backend: str) -> None:
        points = []
        for result in _starting_with(report, prefix):
            median = result.median(backend)
            if result.case.message and median:
                there, back = result.case.message
                points.append((there, (there + (back if prefix == "echo_" else 0)) / median / GIB))
        _line(axes, points, backend)

    names = {"echo_": "a tensor, there and back", "take_": "a tensor, one way"}
    has = [prefix for prefix in names if _starting_with(report, prefix)]
    figure = _panels(report, [(names[prefix], prefix, draw) for prefix in has], "size", "GiB/s")
    sizes = {result.case.message[0] for result in _starting_with(report, *names) if result.case.message}
    _ticks(figure, {size: text_of(size) for size in sizes})
    return figure


def rate(report: Report) -> Any:
    """Calls a second by how many are out at once."""

    def draw(axes: Any, prefix: str, backend: str) -> None:
        points = []
        for result in _starting_with(report, prefix):
            if median := result.median(backend):
                points.append((result.calls(), result.calls() / median))
        _line(axes, points, backend)

    names = {"async_builtin_": "a builtin", "async_udf_": "an empty function"}
    has = [prefix for prefix in names if _starting_with(report, prefix)]
    figure = _panels(report, [(names[prefix], prefix, draw) for prefix in has], "calls at once", "calls a second")
    _ticks(figure, {result.calls(): str(result.calls()) for result in _starting_with(report, *names)})
    return figure


def start(report: Report) -> Any:
    """Seconds of a session by the number of ranks."""

    def first(axes: Any, _: None, backend: str) -> None:
        found = sorted(report.starts.items())
        _line(axes, [(size, starts.whole(backend)) for size, starts in found if backend in starts.rounds], backend)

    def again(axes: Any, _: None, backend: str) -> None:
        points = [(result.size, median) for result in sessions if (median := result.median(backend))]
        _line(axes, points, backend)

    firsts = [size for size, starts in report.starts.items() if starts.rounds]
    sessions = _starting_with(report, "session")
    panels: list[Any] = []
    if len(firsts) > 1:
        panels.append(("first session of a process", None, first))
    if len(sessions) > 1:
        panels.append(("a later one", None, again))
    figure = _panels(report, panels, "ranks", "seconds for a session\nwith a call to each rank")
    _ticks(figure, {size: str(size) for size in [*firsts, *(result.size for result in sessions)]})
    return figure


def _line(axes: Any, points: Sequence[tuple[float, float]], backend: str) -> None:
    if points:
        axes.loglog(*zip(*points, strict=True), "o-", color=_COLORS[backend], label=_TITLES[backend])


def _starting_with(report: Report, *prefixes: str) -> list[Result]:
    return [result for result in report.results if result.case.name.startswith(prefixes)]


def _ticks(figure: Any, labels: dict[int, str]) -> None:
    """What was measured, and nothing between; of values that are close to each other, the first."""
    shown: list[int] = []
    for value in sorted(labels):
        if not shown or value >= 1.7 * shown[-1]:
            shown.append(value)
    for axes in figure.axes if figure else ():
        axes.set_xticks(shown, [labels[value] for value in shown])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params("x", labelrotation=30 if max(map(len, labels.values())) > 4 else 0)


def _panels(report: Report, panels: list[tuple[str, Any, Callable[..., None]]], across: str, up: str) -> Any:
    """One panel beside the other, with a line for each backend that has points; None without panels."""
    if not panels:
        return None
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, what, draw) in zip(grid[0], panels, strict=True):
        for backend in report.backends:
            if not isinstance(what, Result) or what.samples.get(backend):
                draw(axes, what, backend)
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.grid(True, which="major", alpha=0.3)
    grid[0][0].set_ylabel(up)
    grid[0][0].legend()
    return figure
