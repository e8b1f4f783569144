"""One rank of one backend under measurement. Rank 0 takes its orders from the controller, rank 1 serves."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
import torch.distributed.rpc as rpc

from .cases import CASES, timed


def main() -> None:
    backend, rank, address = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if backend == "raw":
        _raw(address)
    else:
        _rpc(backend, rank, address)


def _connect(address: str, backend: str, rank: int) -> Connection:
    controller = Client(address, authkey=os.environ["TORCH_RPC_MPI_BENCH_KEY"].encode())
    controller.send((backend, rank, os.getpid()))
    return controller


def _rpc(backend: str, rank: int, address: str) -> None:
    torch.set_num_threads(1)
    if backend == "mpi":
        from mpi4py import MPI

        rank = MPI.COMM_WORLD.rank
        rpc.init_rpc(f"worker{rank}", backend="MPI")  # type: ignore[no-untyped-call]
    else:
        transports = ["uv"] if backend == "tensorpipe-uv" else None
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{address}.{backend}.store",
            _transports=transports,
            _channels=["basic"] if transports else None,
        )
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)  # type: ignore[no-untyped-call]
    with _connect(address, backend, rank) as controller:
        if rank == 0:
            _obey(controller, _measure)
        rpc.shutdown()


def _measure(case: str, samples: int) -> list[float]:
    CASES[case].run(max(samples // 10, 1))  # back from standing still
    return CASES[case].run(samples)


def _obey(controller: Connection, measure: Callable[[str, int], list[float]]) -> None:
    while (order := controller.recv()) is not None:
        controller.send(measure(*order))


def _raw(address: str) -> None:
    """Ping-pong of as many bytes between buffers that were used before, the best that a transport over MPI can do."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    here = bytearray(max(case.message or 0 for case in CASES.values()))

    def serve() -> None:
        while (order := _next_order(comm)) is not None:
            size, samples = order
            view = memoryview(here)[:size]
            for _ in range(samples):
                comm.Recv(view, 0)
                comm.Send(view, 0)

    def measure(case: str, samples: int) -> list[float]:
        size = CASES[case].message
        if size is None:
            return []
        comm.send((size, samples + samples // 10 + 1), 1, tag=1)
        view = memoryview(here)[:size]

        def there_and_back() -> None:
            comm.Send(view, 1)
            comm.Recv(view, 1)

        for _ in range(samples // 10 + 1):
            there_and_back()
        return timed(there_and_back, samples)

    with _connect(address, "raw", comm.rank) as controller:
        if comm.rank == 0:
            _obey(controller, measure)
            comm.send(None, 1, tag=1)
        else:
            serve()


def _next_order(comm: Any) -> Any:
    """Waits without spinning: the other backends are being measured meanwhile."""
    while not comm.iprobe(0, tag=1):
        time.sleep(0.001)
    return comm.recv(source=0, tag=1)


if __name__ == "__main__":
    main()
