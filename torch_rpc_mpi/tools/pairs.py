"""Every pair of ranks once: in which order they are measured, and which of them are slow or broken."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .facts import Fact, Status, count_text

# Beyond what noise does: the best of several turns is taken.
_SLOW = 3.0
_LEAST_DIFFERENCE = 100e-6  # seconds of latency
_NAMED = 6  # pairs in a fact; all are in the JSON


@dataclasses.dataclass
class Pair:
    """What was measured between two ranks."""

    first: int
    second: int
    latency: float | None = None  # seconds, of an empty call there and back
    bandwidth: float | None = None  # bytes a second, of a tensor that goes one way
    error: str = ""
    slow: str = ""  # in which way

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def rounds(size: int) -> list[list[tuple[int, int]]]:
    """The pairs in rounds as of a tournament: in each, every rank is in one pair at most."""
    players = list(range(size)) + ([-1] if size % 2 else [])  # who meets -1 has a rest
    result = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        met = zip(players[:half], reversed(players[half:]), strict=True)
        result.append([(min(pair), max(pair)) for pair in met if -1 not in pair])
        players = [players[0], players[-1], *players[1:-1]]
    return result


def mark_slow(pairs: Sequence[Pair], hosts: Sequence[str]) -> list[Pair]:
    """Marks those that are far from the median of their kind, within a host or across. Returns them.

    Args:
        hosts: by rank.
    """
    for kind in (True, False):
        alike = [pair for pair in pairs if not pair.error and (hosts[pair.first] == hosts[pair.second]) == kind]
        latency = statistics.median([pair.latency or 0.0 for pair in alike] or [0.0])
        bandwidth = statistics.median([pair.bandwidth or 0.0 for pair in alike] or [0.0])
        for pair in alike:
            ways = []
            if pair.latency and pair.latency > max(_SLOW * latency, latency + _LEAST_DIFFERENCE):
                ways.append(f"{pair.latency * 1e6:.0f} µs, where the median is {latency * 1e6:.0f}")
            if pair.bandwidth and pair.bandwidth < bandwidth / _SLOW:
                ways.append(f"{pair.bandwidth / 1e9:.2f} GB/s, where the median is {bandwidth / 1e9:.2f}")
            pair.slow = " and ".join(ways)
    return [pair for pair in pairs if pair.slow]


def verdicts(pairs: Sequence[Pair], hosts: Sequence[str]) -> list[Fact]:
    """What there is to say of them."""
    facts = [*_figures(pairs, hosts)]
    broken = [pair for pair in pairs if pair.error]
    slow = [pair for pair in pairs if pair.slow]
    if broken:
        text = _list([(pair, pair.error) for pair in broken], hosts)
        remedy = "look at these hosts: is the process alive, is a firewall between them, is it the right interface"
        facts.append(Fact("broken_pairs", text, Status.PROBLEM, remedy))
    if slow:
        text = _list([(pair, pair.slow) for pair in slow], hosts)
        remedy = "look for other load, a slow link, or a binding of several ranks to one core on these hosts"
        facts.append(Fact("slow_pairs", text, Status.WARNING, remedy))
    if pairs and not broken and not slow:
        facts.append(Fact("pairs", f"{count_text(len(pairs), 'pair')}: every one works, none is slow"))
    return facts


def _figures(pairs: Sequence[Pair], hosts: Sequence[str]) -> Iterable[Fact]:
    """The medians of each kind."""
    for key, kind in (("within_a_host", True), ("across_hosts", False)):
        alike = [pair for pair in pairs if not pair.error and (hosts[pair.first] == hosts[pair.second]) == kind]
        if alike:
            latency = statistics.median(pair.latency or 0.0 for pair in alike)
            bandwidth = statistics.median(pair.bandwidth or 0.0 for pair in alike)
            text = f"{latency * 1e6:.0f} µs a call, {bandwidth / 1e9:.2f} GB/s one way"
            yield Fact(key, f"{text}, median of {count_text(len(alike), 'pair')}")


def _list(marked: Sequence[tuple[Pair, str]], hosts: Sequence[str]) -> str:
    texts = [f"{who(pair.first, hosts)} with {who(pair.second, hosts)}: {why}" for pair, why in marked[:_NAMED]]
    if len(marked) > _NAMED:
        texts.append(f"and {len(marked) - _NAMED} more")
    counts = Counter(rank for pair, _ in marked for rank in (pair.first, pair.second))
    rank, count = counts.most_common(1)[0]
    if len(marked) > 1 and count == len(marked):
        texts.append(f"{who(rank, hosts)} is in all of them")
    else:
        of_hosts = Counter(host for pair, _ in marked for host in {hosts[pair.first], hosts[pair.second]})
        host, count = of_hosts.most_common(1)[0]
        if len(marked) > 1 and count == len(marked) and len(set(hosts)) > 1:
            texts.append(f"host {host} is in all of them")
    return "; ".join(texts)


def who(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} ({hosts[rank]})"
