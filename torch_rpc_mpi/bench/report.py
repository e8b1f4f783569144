"""The tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .case import MIB
from .results import Comparison, Report, Result
from .world import BARE


def show(report: Report) -> None:
    console = Console()
    # In a file or a pipe, lines may be as long as they need to be.
    if not console.is_terminal:
        console = Console(width=300)
    # Also those in which nothing could be measured.
    for size in sorted({*report.failures, *(result.size for result in report.results)}):
        results = [result for result in report.results if result.size == size]
        if results:
            console.print(_times(report, results, size))
        for backend, failure in report.failures.get(size, {}).items():
            console.print(f"{backend} failed in a world of {size} ranks. {failure}", style="red", markup=False)
    for table in (_starts(report), _memory(report)):
        if table.row_count:
            console.print(table)
    for note in report.notes:
        console.print(note, markup=False)


def _times(report: Report, results: Iterable[Result], size: int) -> Table:
    where = f", {report.device}" if report.device else ""
    table = _table(f"{size} ranks{where}: median (10th to 99th percentile of all samples)", "")
    for backend in report.backends:
        table.add_column(backend, justify="right")
    others = [backend for backend in report.backends if backend != "mpi"] if "mpi" in report.backends else []
    for other in others:
        table.add_column(f"MPI against {other}: times faster (4 of 5 rounds)", justify="right")
    for result in results:
        cells = [_time(result, backend) for backend in report.backends]
        table.add_row(result.case.title, *cells, *(_ratio(result.comparison(other)) for other in others))
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))


def _time(result: Result, backend: str) -> str:
    median = result.median(backend)
    if median is None:
        return ""
    is_rate = result.calls() > 1 and not result.case.restarts
    low, high = (result.percentile(backend, percent) for percent in ((1, 90) if is_rate else (10, 99)))
    if result.case.unit == "core":
        return f"{100 * median:.2f} % ({100 * low:.2f}-{100 * high:.2f})"
    if is_rate:
        median, low, high = (result.calls() / seconds for seconds in (median, high, low))
        return f"{median:,.0f}/s ({low:,.0f}-{high:,.0f})"
    return f"{seconds_text(median)} ({seconds_text(low)}-{seconds_text(high)})"


def seconds_text(seconds: float) -> str:
    """Seconds for people: 33.2 µs."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 100 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds:.2f} s"


def _ratio(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    spread = f"({comparison.low:.2f}-{comparison.high:.2f})"
    return f"{comparison.ratio:.2f} {spread}" if comparison.conclusive else f"no conclusion {spread}"


def _starts(report: Report) -> Table:
    title = "First session, the slowest rank's times: median of the rounds"
    ratio = "init_rpc and shutdown: MPI is times faster (spread)"
    columns = ("MPI_Init", "init_rpc, with it", "first call to each rank", "shutdown")
    table = _table(title, "ranks", "", "rounds", *columns, ratio)
    for size, starts in sorted(report.starts.items()):
        for backend, rounds in starts.rounds.items():
            times = (starts.median(backend, what) for what in ("mpi_init", "init", "calls", "shutdown"))
            cells = ["" if value is None else seconds_text(value) for value in times]
            comparison = None if backend == "mpi" else starts.comparison(backend)
            # Too few rounds for a conclusion about noise, which the spread shows.
            faster = comparison and f"{comparison.ratio:.2f} ({comparison.low:.2f}-{comparison.high:.2f})"
            table.add_row(str(size), backend, str(len(rounds)), *cells, faster or "")
    return table


def _memory(report: Report) -> Table:
    """Only for the loads that need some. Memory that a backend keeps from one case shows in the next as well."""
    backends = [backend for backend in report.backends if backend not in BARE]
    table = _table("Peak of resident memory beyond that after the start, MiB: rank 0, rank 1", "", "ranks", *backends)
    for result in report.results:
        grown = [result.grown.get(backend, {}) for backend in backends]
        if any(grown) and ((result.case.calls or 0) >= 1000 or max(result.case.message or [0]) >= MIB):
            cells = [", ".join(f"{ranks[rank] / MIB:.0f}" for rank in (0, 1) if rank in ranks) for ranks in grown]
            table.add_row(result.case.title, str(result.size), *cells)
    return table
