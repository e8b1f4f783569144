"""Tensors on accelerators: where a rank has them, and what the devices themselves can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .case import MIB, Case, timed

_CHUNK = 4 * MIB  # of a copy through pinned memory; larger ones gained nothing on an H200
_SLOTS = 4  # chunks of pinned memory that are on their way at once


class Devices:
    """The devices of one type, ``kind``, of which each rank uses one: two ranks share one where there is no other."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._module: Any = torch.get_device_module(kind)
        self._count = self._module.device_count()
        if self._count == 0:
            raise RuntimeError(f"there is no device {kind!r} here")

    def of(self, rank: int) -> str:
        return f"{self.kind}:{rank % self._count}"

    def maps(self, rank: int, size: int) -> dict[str, dict[str, str]]:
        """The device maps of a rank: its own device to that of each other."""
        return {f"worker{other}": {self.of(rank): self.of(other)} for other in range(size)}

    def name(self, rank: int) -> str:
        return str(self._module.get_device_name(self.of(rank)))

    def synchronize(self, rank: int) -> None:
        self._module.synchronize(self.of(rank))

    def limit(self, case: Case) -> list[float]:
        """Seconds of bare copies of what the case sends, between the devices of the ranks 0 and 1."""
        assert case.message is not None
        here, there = self.of(0), self.of(1)
        copies = []
        for size, source, target in ((case.message[0], here, there), (case.message[1], there, here)):
            make = self._through_pinned_memory if case.limit == "pinned" else self._directly
            if size:
                copies.append(make(size, source, target))

        def copy() -> None:
            for _ in range(case.calls or 1):
                for one in copies:
                    one()
            for rank in (0, 1):
                self.synchronize(rank)

        timed(copy, case.samples // 10 + 1)
        return timed(copy, case.samples)

    def _directly(self, size: int, source: str, target: str) -> Callable[[], Any]:
        x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for device in (source, target))
        return lambda: y.copy_(x, non_blocking=True)

    def _through_pinned_memory(self, size: int, source: str, target: str) -> Callable[[], Any]:
        """A ring of pinned chunks, that one stream fills and another empties."""
        x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for device in (source, target))
        ring = [torch.empty(min(_CHUNK, size), dtype=torch.uint8, pin_memory=True) for _ in range(_SLOTS)]
        filling, emptying = self._module.Stream(source), self._module.Stream(target)
        filled, emptied = ([self._module.Event() for _ in ring] for _ in range(2))

        def copy() -> None:
            for stream, device in ((filling, source), (emptying, target)):
                stream.wait_stream(self._module.current_stream(device))
            for number, (part, place) in enumerate(zip(torch.split(x, _CHUNK), torch.split(y, _CHUNK), strict=True)):
                slot = number % _SLOTS
                chunk = ring[slot][: len(part)]
                with self._module.stream(filling):
                    filling.wait_event(emptied[slot])
                    chunk.copy_(part, non_blocking=True)
                    filled[slot].record(filling)
                with self._module.stream(emptying):
                    emptying.wait_event(filled[slot])
                    place.copy_(chunk, non_blocking=True)
                    emptied[slot].record(emptying)

        return copy
