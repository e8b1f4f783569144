"""Device maps, as the ranks agree on them: what TensorPipe's backend checks, in its words, for every kind of device.

Every function that takes all ranks' maps is pure and sees the same data on every rank, as those of ``_agreement``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DeviceMap = Mapping[torch.device, torch.device]


@dataclass(frozen=True)
class Wishes:
    """What one rank was given as options."""

    name: str
    device_maps: Mapping[str, DeviceMap]  # by the callee's name
    devices: Sequence[torch.device]


@dataclass(frozen=True)
class Placement:
    """The devices that a rank uses, and where its tensors go, by the peers' names."""

    devices: list[torch.device]
    requests: Mapping[str, DeviceMap]
    responses: Mapping[str, DeviceMap]


_runtimes: dict[str, tuple[str, str]] = {}  # libraries and prefixes, by kind of device


def register_device_runtime(device_type: str, library: str, prefix: str) -> None:
    """Names the runtime library of a kind of device that torch knows as PrivateUse1.

    For CUDA and ROCm it is found. Call this before ``init_rpc``.

    Args:
        device_type: as in ``torch.device``, such as the name given to ``rename_privateuse1_backend``.
        library: path of a library that is loaded already. It has functions with the signatures, and the meaning, of
            those of the CUDA runtime that ``csrc/device/runtime_functions.h`` lists, and a ``prefix + "StreamHandle"``,
            which takes a ``const c10::Stream*`` and returns the runtime's stream.
        prefix: what stands for ``cuda`` in their names.
    """
    _runtimes[device_type] = (library, prefix)


def runtimes() -> dict[str, tuple[str, str]]:
    """What :func:`register_device_runtime` was told."""
    return dict(_runtimes)


def are_used(wishes: Iterable[Wishes]) -> bool:
    """Whether any rank wants devices, or maps that say more than that the CPU stays the CPU."""
    return any(one.devices or any(one.device_maps.values()) for one in wishes)


def types_in(wishes: Iterable[Wishes]) -> list[str]:
    """The kinds of accelerators that any rank names."""
    named = {device.type for one in wishes for device in one.devices}
    named |= {
        device.type for one in wishes for map_ in one.device_maps.values() for pair in map_.items() for device in pair
    }
    return sorted(named - {"cpu"})


def count(device_type: str) -> int:
    """How many devices of this kind torch finds here."""
    module = _module(device_type)
    return 0 if module is None else int(module.device_count())


def _module(device_type: str) -> Any:
    return getattr(torch, device_type, None)


def check(wishes: Sequence[Wishes], counts: Sequence[Mapping[str, int]]) -> None:
    """Raises ValueError, on every rank the same, if a rank's devices or maps cannot be.

    Args:
        wishes: of the ranks, in their order.
        counts: for each rank, how many devices of each kind it has.
    """
    names = [one.name for one in wishes]
    counts_of = dict(zip(names, counts, strict=True))
    devices_of = {one.name: one.devices for one in wishes}
    for one in wishes:
        _check_devices(one, counts_of[one.name])
    for one in wishes:
        if not set(one.device_maps) <= set(names):
            raise ValueError(
                f"Node {one.name} has invalid target node names in its device maps\n"
                f"device maps = {one.device_maps.keys()}\n"
                f"node names = {names}"
            )
        for target, map_ in one.device_maps.items():
            where = f"in its device map for {target}\ndevice map = {dict(map_)}"
            if len(set(map_.values())) != len(map_):
                raise ValueError(f"Node {one.name} has duplicated target devices {where}")
            _check_side(one.name, "source", map_.keys(), devices_of[one.name], counts_of[one.name], where)
            _check_side(one.name, "target", map_.values(), devices_of[target], counts_of[target], where)
    # With one kind there is nothing to look for, rank by rank in what all others wish.
    for one in wishes if len(types_in(wishes)) > 1 else ():
        kinds = {device.type for device in place(one.name, wishes).devices}
        if len(kinds) > 1:
            raise ValueError(
                f"Node {one.name} is to use devices of several kinds for RPC ({', '.join(sorted(kinds))}), but torch's "
                "futures hold tensors of one kind of accelerator. Choose one"
            )


def _check_devices(one: Wishes, counts: Mapping[str, int]) -> None:
    if len(set(one.devices)) != len(one.devices):
        raise ValueError(f"Node {one.name} has duplicated devices\ndevices = {one.devices}")
    if not _exist(one.devices, counts):
        raise ValueError(
            f"Node {one.name} has devices with invalid indices\n"
            f"devices = {one.devices}\n"
            f"device count = {_shown(counts)}"
        )


def _check_side(
    name: str,
    side: str,
    named: Iterable[torch.device],
    devices: Sequence[torch.device],
    counts: Mapping[str, int],
    where: str,
) -> None:
    """The keys of a map, or its values, against what that worker has, or has named."""
    if devices:
        if not {device for device in named if device.type != "cpu"} <= set(devices):
            raise ValueError(f"Node {name} has unexpected {side} devices {where}\ndevices = {devices}")
    elif not _exist(named, counts):
        raise ValueError(
            f"Node {name} has {side} devices with invalid indices {where}\ndevice count = {_shown(counts)}"
        )


def _exist(devices: Iterable[torch.device], counts: Mapping[str, int]) -> bool:
    return all(
        device.type == "cpu" or (device.index is not None and 0 <= device.index < counts.get(device.type, 0))
        for device in devices
    )


def _shown(counts: Mapping[str, int]) -> str:
    return str(next(iter(counts.values()))) if len(counts) == 1 else str(dict(counts))


def place(name: str, wishes: Sequence[Wishes]) -> Placement:
    """What rank ``name`` does of that."""
    own = next(one for one in wishes if one.name == name)
    responses = {
        one.name: {there: here for here, there in one.device_maps[name].items()}
        for one in wishes
        if name in one.device_maps
    }
    devices = list(own.devices)
    if not devices:
        found = {device for map_ in (*own.device_maps.values(), *responses.values()) for device in map_}
        devices = [device for device in found if device.type != "cpu"]
    return Placement(sorted(devices, key=lambda device: (device.type, device.index or 0)), own.device_maps, responses)


def initialize(devices: Sequence[torch.device]) -> None:
    """Makes torch's state for these devices, which a peer may use before the program here does."""
    for device_type in {device.type for device in devices}:
        init = getattr(_module(device_type), "init", None)
        if init is not None:
            init()


def names(devices: Sequence[torch.device]) -> list[str]:
    """The UUIDs of all devices that this process sees, of the kind that it uses; nothing where torch does not tell."""
    if not devices:
        return []
    module = _module(devices[0].type)
    properties = getattr(module, "get_device_properties", None)
    if properties is None:
        return []
    found = [getattr(properties(index), "uuid", None) for index in range(module.device_count())]
    return [] if None in found else [str(uuid) for uuid in found]


def memory(devices: Sequence[torch.device]) -> int:
    """The bytes that the smallest of them has; 0 where torch does not tell."""
    properties = getattr(_module(devices[0].type), "get_device_properties", None) if devices else None
    if properties is None:
        return 0
    return min(int(getattr(properties(device), "total_memory", 0)) for device in devices)
