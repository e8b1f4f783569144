"""The options of backend ``"MPI"``.

``OPTIONS`` is the one place that knows an option's name, type, default, unit, range, environment variable and meaning.
Construction, assignment, environment variables, ``help()`` and ``docs/options.md`` (made by
``python -m torch_rpc_mpi.options``) all come from it.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch._C._distributed_rpc import RpcBackendOptions

if TYPE_CHECKING:
    from mpi4py import MPI
    from typing_extensions import Unpack

    DeviceLike = int | str | torch.device
    DeviceMap = Mapping[DeviceLike, DeviceLike]

ENVIRONMENT_PREFIX = "TORCH_RPC_MPI_"

# A frame carries its inline tensors, and frames are what credits and receive buffers are counted in.
_MAX_EAGER_LIMIT = 1 << 20
# One MPI call takes an int count; below a page, the cost per chunk is all there is.
_MIN_BULK_CHUNK, _MAX_BULK_CHUNK = 1 << 12, 1 << 30


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
        parse: Callable[[str], object] = int if self.type == "int" else float
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


def _check_int(option: Option, value: object) -> int:
    # bool is an int to Python; num_worker_threads=True is a mistake to a reader.
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise option.wrong_type(value, f"an integer ({option.unit})")
    _in_range(option, int(value))
    return int(value)


def _check_float(option: Option, value: object) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise option.wrong_type(value, f"a number ({option.unit})")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"MPIRpcBackendOptions: {option.name} must be finite ({option.unit}), but got {number}")
    _in_range(option, number)
    return number


def _check_str(option: Option, value: object) -> str:
    if not isinstance(value, str):
        raise option.wrong_type(value, "a string")
    return value


def _to_device(value: Any, option: Option) -> torch.device:
    if isinstance(value, bool) or not isinstance(value, (int, str, torch.device)):
        raise option.wrong_type(value, "made of devices (int, str or torch.device)")
    try:
        return torch.device(value)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"MPIRpcBackendOptions: {option.name}: no device {value!r} here: {reason}") from None


def _to_device_map(device_map: object, option: Option) -> dict[torch.device, torch.device]:
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


def _check_device_maps(option: Option, value: object) -> dict[str, dict[torch.device, torch.device]]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise option.wrong_type(value, "a dictionary from callee name to a dictionary of devices")
    for to in value:
        if not isinstance(to, str):
            raise option.wrong_type(to, "keyed by callee names (str)")
    return {to: _to_device_map(device_map, option) for to, device_map in value.items()}


def _check_devices(option: Option, value: object) -> list[torch.device]:
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


def _check_communicator(option: Option, value: object) -> object:
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


OPTIONS: tuple[Option, ...] = (
    Option(
        "num_worker_threads", "int", 16, "threads",
        "How many incoming requests run at once. One more thread moves the data, whatever the requests do.",
        _check_int, minimum=1, maximum=4096, from_environment=True,
    ),
    Option(
        "rpc_timeout", "float", 60.0, "seconds",
        "Default time limit of a call (0 = no limit); a call's own `timeout=` wins.",
        _check_float, minimum=0,
    ),
    Option(
        "init_method", "str", "mpi://", "URL",
        "Where torch's rendezvous takes its store from. Under a launcher `mpi://` needs no address and no port. "
        "torch's default `env://` means `mpi://` here when torch itself fills it in.",
        _check_str,
    ),
    Option(
        "device_maps", "dict[str, dict]", None, "devices",
        "Per callee name: which device of this worker goes to which device of the callee; one to one. See also "
        "`set_device_map`.",
        _check_device_maps,
    ),
    Option(
        "devices", "list", None, "devices",
        "Accelerators that this worker uses for RPC; by default those in the device maps.",
        _check_devices,
    ),
    Option(
        "comm", "mpi4py.MPI.Intracomm", None, "communicator",
        "Whose members form the RPC group; by default `MPI.COMM_WORLD`. It is duplicated, so that its own traffic "
        "never mixes with RPC's, and may be freed after `init_rpc`.",
        _check_communicator,
    ),
    Option(
        "init_timeout", "float", 60.0, "seconds",
        "How long `init_rpc` waits for the other ranks (0 = no limit), in `MPI_Init` and while the group forms.",
        _check_float, minimum=0, from_environment=True,
    ),
    Option(
        "eager_limit", "int", 16384, "bytes",
        "Tensors up to this size travel inside the message; larger ones are sent from their own memory. Must be the "
        "same on all ranks.",
        _check_int, minimum=0, maximum=_MAX_EAGER_LIMIT, from_environment=True,
    ),
    Option(
        "bulk_chunk", "int", 4 << 20, "bytes",
        "Large tensors are sent in pieces of this size, so that small messages pass in between. Must be the same on "
        "all ranks.",
        _check_int, minimum=_MIN_BULK_CHUNK, maximum=_MAX_BULK_CHUNK, from_environment=True,
    ),
    Option(
        "spin_time", "float", 0.001, "seconds",
        "How long the engine keeps polling after the last traffic before it starts to sleep: latency against CPU time.",
        _check_float, minimum=0, maximum=3600, from_environment=True,
    ),
    Option(
        "max_sleep", "float", 0.001, "seconds",
        "The longest sleep of an idle engine, and so the latency that a first message from another host may see.",
        _check_float, minimum=1e-6, maximum=1, from_environment=True,
    ),
)  # fmt: skip

_BY_NAME = {option.name: option for option in OPTIONS}


class _Given(TypedDict, total=False):
    """What a type checker knows of the keyword arguments; a unit test compares it with the table."""

    num_worker_threads: int
    rpc_timeout: float
    init_method: str
    device_maps: Mapping[str, DeviceMap] | None
    devices: Sequence[DeviceLike] | None
    comm: MPI.Intracomm | None
    init_timeout: float
    eager_limit: int
    bulk_chunk: int
    spin_time: float
    max_sleep: float


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"its options are {', '.join(_BY_NAME)}"
    return f"MPIRpcBackendOptions has no option {name!r}; {hint}"


class MPIRpcBackendOptions(RpcBackendOptions):  # type: ignore[misc, unused-ignore]
    """Options for ``rpc.init_rpc(..., backend="MPI", rpc_backend_options=...)``.

    Keyword arguments only; all are listed with their meaning in ``docs/options.md`` and in
    ``torch_rpc_mpi.options.OPTIONS``. They are checked here and again on assignment. An engine's knob that is not given
    takes its default from the environment variable ``TORCH_RPC_MPI_<NAME>``, if that is set.

    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: a value out of range, or a communicator that cannot carry RPC.
    """

    num_worker_threads: int
    device_maps: dict[str, dict[torch.device, torch.device]]
    devices: list[torch.device]
    comm: MPI.Intracomm | None
    init_timeout: float
    eager_limit: int
    bulk_chunk: int
    spin_time: float
    max_sleep: float

    def __init__(self, **given: Unpack[_Given]) -> None:
        # pybind11 wants its own part constructed before any attribute of it is set.
        super().__init__()
        for name in given:
            if name not in _BY_NAME:
                raise TypeError(_unknown(name))
        for option in OPTIONS:
            value = given[option.name] if option.name in given else option.default_from(os.environ)  # type: ignore[literal-required]
            setattr(self, option.name, value)

    def __setattr__(self, name: str, value: object) -> None:
        option = _BY_NAME.get(name)
        if option is None:
            raise AttributeError(_unknown(name))
        super().__setattr__(name, option.checked(value))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in _BY_NAME)
        return f"{type(self).__name__}({values})"

    def checked_comm(self) -> MPI.Intracomm | None:
        """The communicator, checked again: it may have been freed since it was given."""
        _BY_NAME["comm"].checked(self.comm)
        return self.comm

    def set_device_map(self, to: str, device_map: DeviceMap) -> None:
        """Adds to the device map for callee ``to``: ``{device here: device there}``, one to one.

        Raises:
            ValueError: a device is already mapped to another one.
        """
        option = _BY_NAME["device_maps"]
        known = self.device_maps.get(to, {})
        added = _to_device_map(device_map, option)
        for source, target in added.items():
            if known.get(source, target) != target:
                raise ValueError(
                    f"`set_device_map` only supports 1-to-1 mapping, trying to map {source} to {target} and "
                    f"{known[source]}"
                )
        self.device_maps = {**self.device_maps, to: _to_device_map({**known, **added}, option)}

    def set_devices(self, devices: Sequence[DeviceLike]) -> None:
        """Sets the accelerators that this worker uses for RPC."""
        self.devices = list(devices)  # type: ignore[arg-type]


MPIRpcBackendOptions.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default) for option in OPTIONS]
)


def render_markdown() -> str:
    """The text of ``docs/options.md``."""
    lines = [
        '# Options of backend "MPI"',
        "",
        "`torch_rpc_mpi.MPIRpcBackendOptions(...)`, given to `rpc.init_rpc` as `rpc_backend_options`. Keyword "
        "arguments only. An argument wins over the environment variable, which wins over the default. Made by "
        "`python -m torch_rpc_mpi.options` from the table in `torch_rpc_mpi/options.py`.",
        "",
        "| Option | Type | Default | Unit | Range | Environment variable | Meaning |",
        "|---|---|---|---|---|---|---|",
    ]
    for option in OPTIONS:
        bounds = [
            f"{sign} {bound:.15g}"
            for sign, bound in (("≥", option.minimum), ("≤", option.maximum))
            if bound is not None
        ]
        environment = f"`{option.environment}`" if option.environment else ""
        lines.append(
            f"| `{option.name}` | `{option.type}` | `{option.default!r}` | {option.unit} | {', '.join(bounds)} | "
            f"{environment} | {option.meaning} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render_markdown())
