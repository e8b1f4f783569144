"""What ranks agree on about devices. The texts are those that torch's own tests look for."""

from __future__ import annotations

import pickle

import pytest
import torch

from torch_rpc_mpi import _devices
from torch_rpc_mpi._devices import Wishes

CPU = torch.device("cpu")


def gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


def two(
    maps: dict[str, dict[torch.device, torch.device]],
    devices: tuple[list[torch.device], list[torch.device]] = ([], []),
) -> list[Wishes]:
    return [Wishes("a", maps, devices[0]), Wishes("b", {}, devices[1])]


@pytest.mark.parametrize(
    ("wishes", "counts", "text"),
    [
        (two({"nobody": {CPU: CPU}}), (0, 0), "Node a has invalid target node names in its device maps"),
        (
            two({"b": {gpu(1): gpu(0)}}),
            (1, 1),
            "Node a has source devices with invalid indices in its device map for b",
        ),
        (
            two({"b": {gpu(0): gpu(1)}}),
            (1, 1),
            "Node a has target devices with invalid indices in its device map for b",
        ),
        (two({"b": {torch.device("cuda"): gpu(0)}}), (1, 1), "source devices with invalid indices"),
        (two({"b": {gpu(0): gpu(0), CPU: gpu(0)}}), (1, 1), "Node a has duplicated target devices"),
        (two({"b": {gpu(0): gpu(0)}}, ([gpu(1)], [])), (2, 1), "Node a has unexpected source devices"),
        (two({"b": {gpu(0): gpu(0)}}, ([], [gpu(1)])), (2, 2), "Node a has unexpected target devices"),
        (two({}, ([gpu(0), gpu(0)], [])), (1, 1), "Node a has duplicated devices"),
        (two({}, ([gpu(4)], [])), (1, 1), "Node a has devices with invalid indices"),
        (two({"b": {gpu(0): torch.device("xpu:0")}}), (1, 1), "target devices with invalid indices"),
    ],
)
def test_check_refuses(wishes: list[Wishes], counts: tuple[int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _devices.check(wishes, [{"cuda": count} for count in counts])


def test_check_refuses_two_kinds_in_one_worker() -> None:
    wishes = two({"b": {gpu(0): gpu(0)}}, ([gpu(0), torch.device("xpu:0")], []))
    with pytest.raises(ValueError, match=r"Node a is to use devices of several kinds for RPC \(cuda, xpu\)"):
        _devices.check(wishes, [{"cuda": 1, "xpu": 1}, {"cuda": 1, "xpu": 1}])


def test_maps_are_turned_round_for_responses() -> None:
    wishes = two({"b": {gpu(0): gpu(1), CPU: gpu(0)}})
    _devices.check(wishes, [{"cuda": 2}, {"cuda": 2}])
    a, b = (_devices.place(name, wishes) for name in ("a", "b"))
    assert a.devices == [gpu(0)]
    assert a.responses == {}
    assert b.devices == [gpu(0), gpu(1)]
    assert b.responses == {"a": {gpu(1): gpu(0), gpu(0): CPU}}


def test_given_devices_are_all_that_are_used() -> None:
    wishes = two({"b": {gpu(1): gpu(0)}}, ([gpu(1), gpu(0)], []))
    _devices.check(wishes, [{"cuda": 2}, {"cuda": 2}])
    assert _devices.place("a", wishes).devices == [gpu(0), gpu(1)]


def test_nobody_is_asked_for_devices_that_nobody_wants() -> None:
    assert not _devices.are_used(two({}))
    assert _devices.are_used(two({"b": {CPU: gpu(0)}}))
    assert _devices.types_in(two({"b": {CPU: gpu(0)}})) == ["cuda"]


def test_wishes_travel() -> None:
    wishes = two({"b": {gpu(0): CPU}})
    assert pickle.loads(pickle.dumps(wishes)) == wishes


def test_a_kind_of_device_that_torch_lacks_has_none() -> None:
    assert _devices.count("nonsense") == 0
