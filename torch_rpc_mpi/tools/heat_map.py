"""The pairs as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pairs import Pair


def save(path: Path, pairs: Sequence[Pair], hosts: Sequence[str]) -> None:
    """Writes latency and bandwidth of every pair, broken ones crossed. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = len(hosts)
    figure, axes = pyplot.subplots(1, 2, figsize=(max(9.0, size * 0.5), max(4.0, size * 0.25)), layout="constrained")
    _draw(axes[0], pairs, hosts, "µs of a call", [1e6 * (pair.latency or 0.0) for pair in pairs], "viridis_r")
    _draw(axes[1], pairs, hosts, "GB/s one way", [(pair.bandwidth or 0.0) / 1e9 for pair in pairs], "viridis")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(
    axes: Any, pairs: Sequence[Pair], hosts: Sequence[str], title: str, values: Sequence[float], colors: str
) -> None:
    size = len(hosts)
    grid = [[float("nan")] * size for _ in range(size)]
    for pair, value in zip(pairs, values, strict=True):
        if pair.error:
            axes.plot([pair.first, pair.second], [pair.second, pair.first], "rx")
            continue
        grid[pair.first][pair.second] = grid[pair.second][pair.first] = value
    image = axes.imshow(grid, cmap=colors)
    axes.figure.colorbar(image, ax=axes, label=title)
    axes.set_xlabel("rank")
    starts = [rank for rank in range(size) if rank == 0 or hosts[rank] != hosts[rank - 1]]
    axes.set_yticks(starts, [f"{rank} {hosts[rank]}" for rank in starts])
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1)
        axes.axvline(start - 0.5, color="white", linewidth=1)
