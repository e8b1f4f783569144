"""Torch's rendezvous, as init_rpc uses it where no launcher brings the ranks together."""

from __future__ import annotations

import socket
import time

import pytest

from torch_rpc_mpi import _rendezvous
from torch_rpc_mpi._torch_api import RENDEZVOUS_TCP_STORE, TCPStore


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_rendezvous, "_abandoned", [])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"mpi:tcp://127.0.0.1:{probe.getsockname()[1]}"


def test_rank_0_does_not_wait_where_nobody_can_say_who_is_missing(address: str) -> None:
    store, rank, size = next(_rendezvous.rendezvous(f"{address}?rank=0&world_size=2"))
    assert (rank, size) == (0, 2)
    other, *_ = next(_rendezvous.rendezvous(f"{address}?rank=1&world_size=2"))
    store.set("key", "value")
    assert other.get("key") == b"value"
    assert RENDEZVOUS_TCP_STORE.current is TCPStore


def test_a_rank_waits_for_rank_0_no_longer_than_init_timeout(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rendezvous, "_limit", 0.2)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^rank 0 did not call init_rpc within 0\.2.* store of tcp://127"):
        next(_rendezvous.rendezvous(f"{address}?rank=1&world_size=2"))
    assert time.monotonic() - begin < 3
    store, *_ = next(_rendezvous.rendezvous(f"{address}?rank=0&world_size=2"))  # so that the one left alone ends
    store.set("key", "value")


def test_a_port_that_is_in_use_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rendezvous, "_abandoned", [])
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(_rendezvous, "environments_url", lambda rank, world_size: place)
        with pytest.raises(
            RuntimeError, match=rf"^rank 0 is to serve .* its port is in use \({place}\)\. Set MASTER_PORT"
        ):
            _rendezvous._store_of_environment(0, 2)
