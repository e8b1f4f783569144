"""One row of the options' table, and the checks that its rows name.

A check takes the row and the value that was given, and returns the value in its normal form. It raises TypeError or
ValueError with the option's name, what was given, and what would do.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ENVIRONMENT_PREFIX = "TORCH_RPC_MPI_"


@dataclass(frozen=True)
class Option:
    """One row of the table."""

    name: str
    type: str
    default: object
    unit: str
    meaning: str
    check: Callable[[Option, object], object]
    minimum: float | None = None
    maximum: float | None = None
    from_environment: bool = False

    @property
    def environment(self) -> str | None:
        """The variable that gives the default of an engine's knob; the rest is a program's own business."""
        return ENVIRONMENT_PREFIX + self.name.upper() if self.from_environment else None

    def checked(self, value: object) -> object:
        """``value`` in its normal form. Raises TypeError or ValueError, naming the option and what was given."""
        return self.check(self, value)

    def wrong_type(self, value: object, what: str) -> TypeError:
        return TypeError(
            f"MPIRpcBackendOptions: {self.name} must be {what}, but got {value!r} of type {type(value).__name__}"
        )

    def default_from(self, environ: Mapping[str, str]) -> object:
        """The default: from the environment where the option has a variable that is set, else the table's."""
        text = environ.get(self.environment) if self.environment else None
        if text is None:
            return self.checked(self.default)
        parse: Callable[[str], object] = {"int": int, "float": float}.get(self.type, str)
        try:
            return self.checked(parse(text))
        except ValueError as error:
            raise ValueError(
                f"environment variable {self.environment}={text!r} is not usable: {error}. Correct or unset it "
                f"(default: {self.default} {self.unit})."
            ) from None


def _in_range(option: Option, value: float) -> None:
    limits = []
    if option.minimum is not None and value < option.minimum:
        limits.append(f"at least {option.minimum:.15g}")
    if option.maximum is not None and value > option.maximum:
        limits.append(f"at most {option.maximum:.15g}")
    if limits:
        no_limit = "; 0 means no limit" if "0 = no limit" in option.meaning else ""
        raise ValueError(
            f"MPIRpcBackendOptions: {option.name} must be {limits[0]} ({option.unit}{no_limit}), but got {value}"
        )


def check_int(option: Option, value: object) -> int:
    # bool is an int to Python; num_worker_threads=True is a mistake to a reader.
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise option.wrong_type(value, f"an integer ({option.unit})")
    _in_range(option, int(value))
    return int(value)


def check_float(option: Option, value: object) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise option.wrong_type(value, f"a number ({option.unit})")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"MPIRpcBackendOptions: {option.name} must be finite ({option.unit}), but got {number}")
    _in_range(option, number)
    return number


def check_str(option: Option, value: object) -> str:
    if not isinstance(value, str):
        raise option.wrong_type(value, "a string")
    return value


def check_directory(option: Option, value: object) -> str:
    """An empty text, or the path of a directory in which files can be made."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    path = check_str(option, value)
    if path and not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
        raise ValueError(f"{option.name} must be a directory in which files can be made, but {path!r} is none")
    return path


def check_choice(option: Option, value: object) -> str:
    """One of the words in the option's type, which reads ``"a", "b" or "c"``."""
    choices = re.findall(r'"(\w+)"', option.type)
    if not isinstance(value, str):
        raise option.wrong_type(value, "one of " + ", ".join(map(repr, choices)))
    if value not in choices:
        raise ValueError(
            f"MPIRpcBackendOptions: {option.name} must be one of {', '.join(map(repr, choices))}, but got {value!r}"
        )
    return value


def _to_device(value: Any, option: Option) -> torch.device:
    if isinstance(value, bool) or not isinstance(value, (int, str, torch.device)):
        raise option.wrong_type(value, "made of devices (int, str or torch.device)")
    try:
        return torch.device(value)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"MPIRpcBackendOptions: {option.name}: no device {value!r} here: {reason}") from None


def to_device_map(device_map: object, option: Option) -> dict[torch.device, torch.device]:
    if not isinstance(device_map, Mapping):
        raise option.wrong_type(device_map, "a dictionary from callee name to a dictionary of devices")
    full: dict[torch.device, torch.device] = {}
    reverse: dict[torch.device, torch.device] = {}
    for source, target in device_map.items():
        source, target = _to_device(source, option), _to_device(target, option)
        if target in reverse:
            raise ValueError(
                f"`device_map` only supports 1-to-1 mapping, trying to map {source} and {reverse[target]} to {target}"
            )
        full[source] = target
        reverse[target] = source
    return full


def check_device_maps(option: Option, value: object) -> dict[str, dict[torch.device, torch.device]]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise option.wrong_type(value, "a dictionary from callee name to a dictionary of devices")
    for to in value:
        if not isinstance(to, str):
            raise option.wrong_type(to, "keyed by callee names (str)")
    return {to: to_device_map(device_map, option) for to, device_map in value.items()}


def check_devices(option: Option, value: object) -> list[torch.device]:
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise option.wrong_type(value, "a list of devices")
    devices = [_to_device(device, option) for device in value]
    for device in devices:
        if device.type in ("cpu", "meta"):
            raise ValueError(
                f"`set_devices` expect a list of accelerator devices, but got device type {device.type}. CPU tensors "
                "need no entry."
            )
    return devices


def check_communicator(option: Option, value: object) -> object:
    if value is None:
        return None
    # Whoever holds a communicator has imported mpi4py.MPI; importing it here would initialise MPI.
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or not isinstance(value, MPI.Comm):
        raise option.wrong_type(value, "an mpi4py intracommunicator")
    if MPI.Is_finalized():
        raise ValueError("MPIRpcBackendOptions: comm cannot be used any more, because MPI was finalised")
    if value == MPI.COMM_NULL:
        raise ValueError(
            "MPIRpcBackendOptions: comm is MPI.COMM_NULL: it was freed, or this process is no member of it (Split() "
            "with MPI.UNDEFINED gives that). Call init_rpc on the members only, and free the communicator afterwards."
        )
    if value.Is_inter():
        raise ValueError(
            "MPIRpcBackendOptions: comm is an intercommunicator, which has two groups of ranks, but RPC needs one. "
            "Pass comm.Merge() of it."
        )
    return value
