"""The report on the terminal, in lines that grep and cut take, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .facts import Fact, Status
from .pairs import Pair

_COLORS = {Status.OK: "green", Status.NOTE: "blue", Status.WARNING: "yellow", Status.PROBLEM: "bold red"}
_LARGEST_TABLE = 16  # ranks; the JSON and the heat map take any number


def show(facts: Sequence[Fact], parsable: bool) -> None:
    """Prints one line for each."""
    for line in map(_parsable if parsable else _plain, facts):
        print(line, flush=True)


def _key(fact: Fact) -> str:
    return f"{fact.host}:{fact.key}" if fact.host else fact.key


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _parsable(fact: Fact) -> str:
    fields = [_key(fact), _one_line(fact.value), fact.status.value, _one_line(fact.remedy)]
    return "\t".join(fields if fact.remedy else fields[:3])


def _plain(fact: Fact) -> str:
    remedy = f" -- {_one_line(fact.remedy)}" if fact.remedy else ""
    return f"{fact.status.value:8} {_key(fact):17} {_one_line(fact.value)}{remedy}"


def printer(parsable: bool) -> Callable[[Sequence[Fact]], None]:
    """What prints facts, in colours if rich is installed and a terminal reads them."""
    if parsable or not sys.stdout.isatty():
        return lambda facts: show(facts, parsable)
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return lambda facts: show(facts, parsable)
    console = Console()

    def print_in_colours(facts: Sequence[Fact]) -> None:
        for fact in facts:
            line = Text(_plain(fact))
            line.stylize(_COLORS[fact.status], 0, len(fact.status.value))
            line.highlight_regex(r" -- .*$", "italic")
            console.print(line, soft_wrap=True)

    return print_in_colours


def print_matrices(pairs: Sequence[Pair], hosts: Sequence[str]) -> None:
    """Latency above the diagonal, bandwidth below it."""
    size = len(hosts)
    if size > _LARGEST_TABLE:
        print(f"(the table of {size} ranks is left out; --json and --plot have it)")
        return
    cells = {}
    for pair in pairs:
        marks = "!" if pair.slow else ""
        latency, bandwidth = pair.latency or 0.0, pair.bandwidth or 0.0
        cells[pair.first, pair.second] = "broken" if pair.error else f"{latency * 1e6:.0f}{marks}"
        cells[pair.second, pair.first] = "broken" if pair.error else f"{bandwidth / 1e9:.2f}{marks}"
    print("\nµs of a call (above the diagonal) and GB/s one way (below); ! slow")
    print(f"{'rank':>8} " + "".join(f"{rank:>9}" for rank in range(size)) + "  host")
    for row in range(size):
        values = "".join(f"{cells.get((row, column), '-'):>9}" for column in range(size))
        print(f"{row:>8} {values}  {hosts[row]}", flush=True)


def print_json(
    facts: Sequence[Fact],
    about: dict[str, Any],
    pairs: Sequence[Pair],
    hosts: Sequence[str],
    device_paths: Sequence[dict[str, Any]],
) -> None:
    document = {
        **about,
        "facts": [fact.as_json() for fact in facts],
        "hosts": list(hosts),
        "pairs": [pair.as_json() for pair in pairs],
        "device_paths": list(device_paths),
    }
    print(json.dumps(document, indent=1), flush=True)
