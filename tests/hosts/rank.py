"""One rank of a world across hosts. Run by hosts.py, which says what happens to rank 2.

    python rank.py RANK SIZE DIRECTORY HEARTBEAT_TIMEOUT PACE

PACE: "idle", "waits" (a call after the other) or "streams" (many under way). Writes what it saw to DIRECTORY/RANK.json.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed.rpc as rpc

import torch_rpc_mpi

LENGTHS = (1, 100, 5_000, 50_000, 300_000)  # of tensors of float, 4 bytes each


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


class Caller:
    """Calls a worker from a thread of its own until it is told to stop or a call fails."""

    def __init__(self, worker: str, under_way: int, over: Path) -> None:
        self.worker, self.answered, self.longest = worker, 0, 0.0
        self.error: tuple[float, str] | None = None
        self._under_way, self._over = under_way, over
        self._calls: collections.deque[tuple[float, torch.Tensor, torch.futures.Future[torch.Tensor]]]
        self._calls = collections.deque()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            for length in itertools.cycle(LENGTHS):
                if self._over.exists():
                    break
                sent = torch.full((length,), float(self.answered))
                self._calls.append((time.monotonic(), sent, rpc.rpc_async(self.worker, identity, args=(sent,))))
                if len(self._calls) >= self._under_way:
                    self._take()
            while self._calls:
                self._take()
        except RuntimeError as error:
            self.error = (time.time(), str(error))
        for _, _, call in self._calls:
            with contextlib.suppress(RuntimeError):
                call.wait()

    def _take(self) -> None:
        began, sent, call = self._calls.popleft()
        assert torch.equal(call.wait(), sent)
        self.longest = max(self.longest, time.monotonic() - began)
        self.answered += 1


def main() -> None:
    rank, size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    heartbeat_timeout, pace = float(sys.argv[4]), sys.argv[5]
    faulthandler.dump_traceback_later(3 * heartbeat_timeout + 120, exit=True)
    torch.set_num_threads(1)
    options = torch_rpc_mpi.MPIRpcBackendOptions(
        init_method=f"file://{directory}/store",
        node=f"node{rank}",
        heartbeat_timeout=heartbeat_timeout,
        rpc_timeout=300,
    )
    rpc.init_rpc(f"worker{rank}", "MPI", rank, size, options)
    lost: list[str] = []
    torch_rpc_mpi.on_worker_lost(lambda worker, _: lost.append(worker.name))
    workers = [f"worker{other}" for other in range(size)]
    for worker in workers:
        rpc.rpc_sync(worker, identity, args=(torch.ones(1),))
    (directory / f"{rank}.ready").touch()
    over = directory / "over"
    callers = []
    if pace != "idle":
        others = [worker for worker in workers if worker != workers[rank]]
        callers = [Caller(worker, 1 if pace == "waits" else 20, over) for worker in others for _ in range(2)]
    while not over.exists():
        time.sleep(0.01)
    for caller in callers:
        caller.thread.join()
    for worker in workers:  # those that live go on
        if worker not in lost:
            rpc.rpc_sync(worker, identity, args=(torch.ones(1),))
    report = {
        "answered": sum(caller.answered for caller in callers),
        "longest": max((caller.longest for caller in callers), default=0.0),
        "errors": [(caller.worker, *caller.error) for caller in callers if caller.error is not None],
        "lost": lost,
    }
    (directory / f"{rank}.new").write_text(json.dumps(report))
    os.rename(directory / f"{rank}.new", directory / f"{rank}.json")
    while not (directory / "leave").exists():
        time.sleep(0.01)
    rpc.shutdown(graceful=False)


if __name__ == "__main__":
    main()
