"""What the ranks of the soak send to each other, and the functions that they call."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from torch.futures import Future


class Piece(NamedTuple):
    """Which bytes an argument has, so that whoever gets it can check them."""

    start: int
    size: int
    form: str

    def value(self) -> Any:
        data = pattern[0][self.start : self.start + self.size]
        if self.form == "bytes":
            return data.numpy().tobytes()
        if self.form == "list":
            return list(data.tensor_split(3))
        if self.form == "strided":
            return pattern[0][self.start : self.start + 2 * self.size : 2]
        return data

    def check(self, value: Any) -> None:
        expected = self.value()
        if isinstance(expected, Tensor):
            right = torch.equal(value, expected)
        elif isinstance(expected, list):
            right = len(value) == len(expected) and all(map(torch.equal, value, expected))
        else:
            right = value == expected
        if not right:
            raise AssertionError(f"{rpc.get_worker_info()} received something else than {self}")


class Count:
    def __init__(self) -> None:
        self.value, self._lock = 0, threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.value += 1


pattern: list[Tensor] = []  # random bytes, the same at all ranks
executions = Count()  # functions of this module, here


def take_and_return(piece: Piece, value: Any) -> Any:
    executions.add()
    piece.check(value)
    return value


def nested(piece: Piece, value: Any, route: list[str]) -> Any:
    take_and_return(piece, value)
    return rpc.rpc_sync(route[0], nested, args=(piece, value, route[1:])) if route else value


@rpc.functions.async_execution
def elsewhere(piece: Piece, value: Any, to: str) -> Future[Any]:
    executions.add()
    return rpc.rpc_async(to, take_and_return, args=(piece, value)).then(lambda future: future.wait())


class Held:
    """A remote object."""

    def __init__(self, piece: Piece, value: Any) -> None:
        self.value = take_and_return(piece, value)

    def read(self) -> Any:
        executions.add()
        return self.value


def read_as_owner(held: rpc.RRef) -> Any:
    return held.local_value().read()


def read_as_user(held: rpc.RRef) -> Any:
    return held.rpc_sync().read()


def fail(text: str) -> None:
    executions.add()
    raise ValueError(text)


@torch.jit.script
def script_flip(x: Tensor) -> Tensor:
    return 255 - x
