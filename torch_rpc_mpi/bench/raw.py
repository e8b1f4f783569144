"""MPI itself: as many bytes, of a small call 64, in the same pattern, between buffers that were used before."""

from __future__ import annotations

from collections.abc import Callable

from .case import Case, timed

_ASKING, _ANSWER = 1, 2  # tags


class Raw:
    """The ranks of the world. The best that a transport over MPI can do, but for copies that it saves elsewhere."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self._wait_for_all = MPI.Request.Waitall

    def run(self, case: Case) -> list[float]:
        """Seconds, one value a sample, that it took to get the answers; nothing where this rank does not call."""
        comm = self._comm
        callees = case.callees(comm.rank, comm.size)
        callers = [rank for rank in range(comm.size) if comm.rank in case.callees(rank, comm.size)]
        if case.callers == "first" and case.calls == 1:
            exchange = self._one(case, callees, callers)
        else:
            exchange = self._several(case, callees, callers)
        timed(exchange, case.samples // 10 + 1)
        comm.Barrier()
        samples = timed(exchange, case.samples)
        return samples if callees else []

    def _one(self, case: Case, callees: list[int], callers: list[int]) -> Callable[[], None]:
        """One message there, then one back."""
        assert case.message is not None
        there, back = (memoryview(bytearray(size)) for size in case.message)
        comm = self._comm
        if callers and case.message[0] == case.message[1]:
            back = there  # an echo sends what it has received

        def exchange() -> None:
            for callee in callees:
                comm.Send(there, callee)
                comm.Recv(back, callee)
            for caller in callers:
                comm.Recv(there, caller)
                comm.Send(back, caller)

        return exchange

    def _several(self, case: Case, callees: list[int], callers: list[int]) -> Callable[[], None]:
        """All messages at once, each of which is answered as it is found."""
        assert case.message is not None
        there, back = (memoryview(bytearray(size)) for size in case.message)
        asked = memoryview(bytearray(case.message[0]))
        comm, count = self._comm, case.calls or 1
        answers = [(callee, bytearray(case.message[1])) for callee in callees for _ in range(count)]

        def exchange() -> None:
            requests = [comm.Irecv(answer, callee, _ANSWER) for callee, answer in answers]
            requests += [comm.Isend(there, callee, _ASKING) for callee, _ in answers]
            for caller in callers:
                for _ in range(count):
                    comm.Recv(asked, caller, _ASKING)
                    requests.append(comm.Isend(back, caller, _ANSWER))
            self._wait_for_all(requests)

        return exchange
