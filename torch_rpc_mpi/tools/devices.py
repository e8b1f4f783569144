"""The accelerators that torch has here, and what keeps ranks from sharing their memory.

A child looks, as a process that has asked for CUDA's devices cannot be forked into ones that use them. Each fact is
made of values that somebody else has read, so that every host can be imagined; ``look`` reads them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import _devices, _extension
from . import trial
from .facts import Fact, Status, count_text
from .place import Place
from .trial import Tell, Trial

_LIMIT = 60.0  # seconds, for a driver that starts its devices
_SMI_LIMIT = 10.0
# Those that hide devices of a kind; of others, by the kind's name.
_HIDING = {"cuda": ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")}
# The namespaces that the kernel begins with, by /proc/self/ns: PROC_IPC_INIT_INO and PROC_PID_INIT_INO.
_OF_THE_HOST = {"ipc": "ipc:[4026531839]", "pid": "pid:[4026531836]"}
_SHARE_NAMESPACES = (
    "put all ranks of a host into one container, or let theirs share the host's: `docker run --ipc=host --pid=host`"
)


@dataclass(frozen=True)
class Devices:
    """What one rank has."""

    kind: str = ""  # as in torch.device; empty: torch knows no accelerator
    names: Sequence[str] = ()  # by index
    uuids: Sequence[str] = ()  # likewise; empty: torch does not tell
    library: str = ""  # of the runtime; empty: there is none, or it does not fit
    refusal: str = ""  # why
    apart: Sequence[tuple[int, int]] = field(default=())  # the first cannot use the second's memory

    @property
    def sendable(self) -> int:
        """How many can be given to device maps."""
        return len(self.names) if self.library else 0


def look() -> Trial:
    """The fields of :class:`Devices`, as far as they were found."""
    return trial.run(_look, _LIMIT)


def found_by(looked: Trial) -> Devices:
    return Devices(**looked.found)


def _look(tell: Tell) -> None:
    tell({}, "torch.accelerator")
    kind = _kind()
    if not kind:
        return
    tell({"kind": kind}, f"torch.{kind}.device_count()")
    count = _devices.count(kind)
    module: Any = getattr(torch, kind)
    tell({"names": [str(module.get_device_name(index)) for index in range(count)]}, "the runtime library")
    tell({"uuids": _devices.names([torch.device(kind, 0)] if count else [])}, "")
    extension = _extension.load()
    for device_type, library_and_prefix in _devices.runtimes().items():
        extension.register_device_runtime(device_type, *library_and_prefix)
    try:
        tell({"library": extension.find_device_runtime(kind)}, "access between devices")
    except RuntimeError as error:
        tell({"refusal": str(error)}, "")
        return
    pairs = [(device, peer) for device in range(count) for peer in range(count) if device != peer]
    tell({"apart": [pair for pair in pairs if not extension.can_access_peer(kind, *pair)]}, "")


def _kind() -> str:
    try:
        device = torch.accelerator.current_accelerator()
    except RuntimeError:  # of torch 2.6, where there is none
        return ""
    return "" if device is None or device.type == "cpu" else device.type


def facts(looked: Trial, place: Place, environ: Mapping[str, str] = os.environ) -> list[Fact]:
    """One line where torch is a build for the CPU."""
    devices = found_by(looked)
    if looked.failure:
        said = f", and it printed: {looked.said}" if looked.said else ""
        remedy = "look at the driver of the devices (`nvidia-smi`, `rocm-smi`); CPU tensors are not concerned"
        return [Fact("devices", f"{looked.step} failed: {looked.failure}{said}", Status.WARNING, remedy)]
    if not devices.kind:
        return [Fact("devices", "none: this torch is a build for the CPU")]
    hiding = _hiding(devices.kind, environ)
    found = [seen(devices, hiding)]
    if devices.names:
        found += [runtime(devices), *visibility(devices, hiding, place)]
    if devices.sendable:
        found.append(sharing(devices, _modes(devices.kind), _own_namespaces()))
    return found


def _hiding(kind: str, environ: Mapping[str, str]) -> dict[str, str]:
    names = _HIDING.get(kind, (f"{kind.upper()}_VISIBLE_DEVICES",))
    return {name: environ[name] for name in names if name in environ}


def _set(hiding: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in hiding.items())


def seen(devices: Devices, hiding: Mapping[str, str]) -> Fact:
    """How many there are, and what they are called."""
    if devices.names:
        listed = ", ".join(f"{devices.kind}:{index} {name}" for index, name in enumerate(devices.names))
        return Fact("devices", f"{count_text(len(devices.names), 'device')} that torch sees: {listed}")
    value = f"none that torch sees, although it is a build for {devices.kind}"
    if hiding:
        return Fact("devices", f"{value}: {_set(hiding)}", Status.NOTE, f"unset {', '.join(hiding)}, if there are any")
    remedy = (
        "if the host has any: does the driver work (`nvidia-smi`, `rocm-smi`), does the container have them (`--gpus`)"
    )
    return Fact("devices", value, Status.NOTE, remedy)


def runtime(devices: Devices) -> Fact:
    """Whether tensors on them can be sent at all."""
    key = "device_runtime"
    if devices.library:
        return Fact(key, f"{devices.library}, with all functions that are needed")
    remedy = "send CPU tensors; or install a build of torch for CUDA or ROCm, with the runtime as a library of its own"
    return Fact(key, f"tensors on devices cannot be sent: {devices.refusal}", Status.WARNING, remedy)


def visibility(devices: Devices, hiding: Mapping[str, str], place: Place) -> list[Fact]:
    """What hides devices from this rank, if anything does."""
    if not hiding:
        return []
    key = "visible_devices"
    value = f"{_set(hiding)}: this process sees {count_text(len(devices.names), 'device')}"
    if (place.ranks_here or 1) == 1:
        return [Fact(key, value, Status.NOTE)]
    remedy = (
        "let each rank see all devices of its host, and choose by its rank there: no --gpus-per-task, no "
        f"{next(iter(hiding))} for each rank"
    )
    value += "; from ranks of this host that see others, tensors come through pinned memory"
    return [Fact(key, value, Status.WARNING if len(devices.names) == 1 else Status.NOTE, remedy)]


def sharing(devices: Devices, modes: Mapping[str, str], own_namespaces: Sequence[str]) -> Fact:
    """Whether ranks of this host can use each other's device memory, as far as one of them can tell.

    Args:
        modes: compute modes by UUID, as nvidia-smi calls them.
        own_namespaces: kinds of namespaces that are not those of the host.
    """
    key = "device_memory"
    exclusive = [index for index, uuid in enumerate(devices.uuids) if modes.get(uuid, "Default") != "Default"]
    if exclusive:
        mode = modes[devices.uuids[exclusive[0]]]
        named = ", ".join(f"{devices.kind}:{index}" for index in exclusive)
        value = f"{named} in compute mode {mode}: one process each, so ranks cannot share one"
        remedy = "a device for each rank; or `nvidia-smi -c DEFAULT`, as root of the host"
        return Fact(key, value, Status.WARNING, remedy)
    if devices.apart:
        pairs = Counter(frozenset(pair) for pair in devices.apart)
        named = ", ".join("-".join(str(index) for index in sorted(pair)) for pair in pairs)
        value = f"{devices.kind} {named} cannot use each other's: tensors between them go through pinned memory"
        remedy = (
            "ranks that send each other much on devices that can (`nvidia-smi topo -p2p r`); virtual machines and "
            "IOMMUs may forbid it"
        )
        return Fact(key, value, Status.NOTE, remedy)
    if own_namespaces:
        value = f"can be shared by ranks that share this container's namespaces ({', '.join(own_namespaces)})"
        return Fact(key, value, Status.NOTE, _SHARE_NAMESPACES)
    return Fact(key, "can be shared by ranks of this host, as far as one of them can tell")


def _own_namespaces() -> list[str]:
    return [kind for kind, host in _OF_THE_HOST.items() if _namespace(kind) not in (host, "")]


def _namespace(kind: str) -> str:
    try:
        return str(Path("/proc/self/ns", kind).readlink())
    except OSError:
        return ""


def _modes(kind: str) -> dict[str, str]:
    """The compute modes that nvidia-smi knows of, by UUID as torch writes it."""
    command = shutil.which("nvidia-smi") if kind == "cuda" else None
    if command is None:
        return {}
    query = [command, "--query-gpu=uuid,compute_mode", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SMI_LIMIT)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return modes_in(said.stdout)


def modes_in(said: str) -> dict[str, str]:
    """Of lines such as "GPU-UUID, Exclusive_Process"."""
    return dict(re.findall(r"^(?:GPU-)?(\S+), (\w+)$", said, re.MULTILINE))
