"""The options of backend ``"MPI"``.

``OPTIONS`` is the one place that knows an option's name, type, default, unit, range, environment variable and meaning.
Construction, assignment, environment variables, ``help()`` and ``docs/options.md`` (made by
``python -m torch_rpc_mpi.options``) all come from it.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

import torch

from ._option_checks import (
    Option,
    check_choice,
    check_communicator,
    check_device_maps,
    check_devices,
    check_directory,
    check_float,
    check_int,
    check_str,
    to_device_map,
)
from ._torch_api import RpcBackendOptions

if TYPE_CHECKING:
    from mpi4py import MPI
    from typing_extensions import Unpack

DeviceLike = int | str | torch.device
DeviceMap = Mapping[DeviceLike, DeviceLike]

# A frame carries its inline tensors, and frames are what credits and receive buffers are counted in.
_MAX_EAGER_LIMIT = 1 << 20
# One MPI call takes an int count; below a page, the cost per chunk is all there is.
_MIN_BULK_CHUNK, _MAX_BULK_CHUNK = 1 << 12, 1 << 30


OPTIONS: tuple[Option, ...] = (
    Option(
        "num_worker_threads", "int", 16, "threads",
        "How many incoming requests run at once. One more thread moves the data, whatever the requests do.",
        check_int, minimum=1, maximum=4096, from_environment=True,
    ),
    Option(
        "rpc_timeout", "float", 60.0, "seconds",
        "Default time limit of a call (0 = no limit); a call's own `timeout=` wins.",
        check_float, minimum=0,
    ),
    Option(
        "init_method", "str", "mpi://", "URL",
        "Where torch's rendezvous takes its store from. Under an MPI launcher `mpi://` needs no address and no port; "
        "without one it means `env://`.",
        check_str,
    ),
    Option(
        "node", "str", "", "name",
        "Without a launcher: ranks that give the same name share memory; by default the host's name. For containers "
        "that share a host's name but no memory, or the other way round.",
        check_str, from_environment=True,
    ),
    Option(
        "device_maps", "dict[str, dict]", None, "devices",
        "Per callee name: which device of this worker goes to which device of the callee; one to one. See also "
        "`set_device_map`.",
        check_device_maps,
    ),
    Option(
        "devices", "list", None, "devices",
        "Accelerators that this worker uses for RPC; by default those in the device maps.",
        check_devices,
    ),
    Option(
        "device_path", '"auto", "mpi" or "pinned"', "auto", "name",
        "How tensors get from a device to another process. `auto`: on one host through device memory that the "
        "processes share, where that can be had; otherwise MPI takes them from the device, if it says that it can; "
        "otherwise through pinned memory. `mpi`: always as MPI takes them, whatever it says. `pinned`: always through "
        "that. Must be the same on all ranks.",
        check_choice, from_environment=True,
    ),
    Option(
        "comm", "mpi4py.MPI.Intracomm", None, "communicator",
        "Whose members form the RPC group; by default `MPI.COMM_WORLD`. It is duplicated, so that its own traffic "
        "never mixes with RPC's, and may be freed after `init_rpc`.",
        check_communicator,
    ),
    Option(
        "init_timeout", "float", 60.0, "seconds",
        "How long `init_rpc` waits for the other ranks (0 = no limit), in `MPI_Init` and while the group forms.",
        check_float, minimum=0, from_environment=True,
    ),
    Option(
        "heartbeat_timeout", "float", 10.0, "seconds",
        "A worker of another host that nothing is heard of for so long is lost: its host or the network to it is down. "
        "An outage of up to two thirds of that loses nothing. Must be the same on all ranks.",
        check_float, minimum=0.1, maximum=86400, from_environment=True,
    ),
    Option(
        "eager_limit", "int", 16384, "bytes",
        "Tensors up to this size travel inside the message; larger ones are sent from their own memory. Must be the "
        "same on all ranks.",
        check_int, minimum=0, maximum=_MAX_EAGER_LIMIT, from_environment=True,
    ),
    Option(
        "bulk_chunk", "int", 1 << 20, "bytes",
        "Large tensors are sent in pieces of this size, so that small messages pass in between. Must be the same on "
        "all ranks.",
        check_int, minimum=_MIN_BULK_CHUNK, maximum=_MAX_BULK_CHUNK, from_environment=True,
    ),
    Option(
        "spin_time", "float", 0.001, "seconds",
        "How long the engine keeps polling after the last traffic before it starts to sleep: latency against CPU time. "
        "At most 30 µs while other processes take its core, where the host has more ranks than cores.",
        check_float, minimum=0, maximum=3600, from_environment=True,
    ),
    Option(
        "max_sleep", "float", 0.001, "seconds",
        "The longest sleep of an engine that has nothing to do, and so the latency that a first message from another "
        "host may see. Where all ranks are on one host, they wake each other, and sleep longer.",
        check_float, minimum=1e-6, maximum=1, from_environment=True,
    ),
    Option(
        "pickler", '"auto" or "pickle" or "cloudpickle"', "auto", "name",
        "How Python functions, arguments and results that this worker sends are pickled. `auto`: by Python's pickle, "
        "and what that cannot send (lambdas, closures, functions of `__main__` that the callee lacks) by value, with "
        "cloudpickle. `pickle`: only as torch does. `cloudpickle`: always with cloudpickle.",
        check_choice,
    ),
    Option(
        "flight_recorder_dir", "str", "", "path",
        "Where the flight recorder, which always keeps the last events of calls, writes them as JSON: when a call "
        "times out, a worker is lost or the process gets SIGUSR2; at most 16 files in a session. Without it only "
        "`torch_rpc_mpi.write_flight_record(path)` writes any.",
        check_directory, from_environment=True,
    ),
)  # fmt: skip


class _Given(TypedDict, total=False):
    """What a type checker knows of the keyword arguments; a unit test compares it with the table."""

    num_worker_threads: int
    rpc_timeout: float
    init_method: str
    node: str
    device_maps: Mapping[str, DeviceMap] | None
    devices: Sequence[DeviceLike] | None
    device_path: Literal["auto", "mpi", "pinned"]
    comm: MPI.Intracomm | None
    init_timeout: float
    heartbeat_timeout: float
    eager_limit: int
    bulk_chunk: int
    spin_time: float
    max_sleep: float
    pickler: Literal["auto", "pickle", "cloudpickle"]
    flight_recorder_dir: str


def signature_of(options: Sequence[Option]) -> inspect.Signature:
    """Keyword arguments, for help() to show with their defaults."""
    return inspect.Signature(
        [inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default) for option in options]
    )


class MPIRpcBackendOptions(RpcBackendOptions):  # type: ignore[misc, unused-ignore]
    """Options for ``rpc.init_rpc(..., backend="MPI", rpc_backend_options=...)``.

    Keyword arguments only; all are listed with their meaning in ``docs/options.md`` and in
    ``torch_rpc_mpi.options.OPTIONS``. They are checked here and again on assignment. An engine's knob that is not given
    takes its default from the environment variable ``TORCH_RPC_MPI_<NAME>``, if that is set.

    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: a value out of range, or a communicator that cannot carry RPC.
    """

    __signature__: ClassVar = signature_of(OPTIONS)
    table: ClassVar = {option.name: option for option in OPTIONS}
    # What of the options the C++ agent reads (AgentOptions in _C.pyi).
    of_agent: ClassVar[tuple[str, ...]] = (
        "num_worker_threads",
        "rpc_timeout",
        "eager_limit",
        "bulk_chunk",
        "spin_time",
        "max_sleep",
        "flight_recorder_dir",
    )

    num_worker_threads: int
    node: str
    device_maps: dict[str, dict[torch.device, torch.device]]
    devices: list[torch.device]
    device_path: str
    comm: MPI.Intracomm | None
    init_timeout: float
    heartbeat_timeout: float
    eager_limit: int
    bulk_chunk: int
    spin_time: float
    max_sleep: float
    pickler: str
    flight_recorder_dir: str

    def __init__(self, **given: Unpack[_Given]) -> None:
        # pybind11 wants its own part constructed before any attribute of it is set.
        super().__init__()
        for name in given:
            if name not in self.table:
                raise TypeError(self._unknown(name))
        for option in self.table.values():
            value = given[option.name] if option.name in given else option.default_from(os.environ)  # type: ignore[literal-required]
            setattr(self, option.name, value)

    def __setattr__(self, name: str, value: object) -> None:
        option = self.table.get(name)
        if option is None:
            raise AttributeError(self._unknown(name))
        super().__setattr__(name, option.checked(value))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.table)
        return f"{type(self).__name__}({values})"

    def _unknown(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.table, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"its options are {', '.join(self.table)}"
        return f"{type(self).__name__} has no option {name!r}; {hint}"

    def checked_comm(self) -> MPI.Intracomm | None:
        """The communicator, checked again: it may have been freed since it was given."""
        self.table["comm"].checked(self.comm)
        return self.comm

    def set_device_map(self, to: str, device_map: DeviceMap) -> None:
        """Adds to the device map for callee ``to``: ``{device here: device there}``, one to one.

        Raises:
            ValueError: a device is already mapped to another one.
        """
        option = self.table["device_maps"]
        known = self.device_maps.get(to, {})
        added = to_device_map(device_map, option)
        for source, target in added.items():
            if known.get(source, target) != target:
                raise ValueError(
                    f"`set_device_map` only supports 1-to-1 mapping, trying to map {source} to {target} and "
                    f"{known[source]}"
                )
        self.device_maps = {**self.device_maps, to: to_device_map({**known, **added}, option)}

    def set_devices(self, devices: Sequence[DeviceLike]) -> None:
        """Sets the accelerators that this worker uses for RPC."""
        self.devices = list(devices)  # type: ignore[arg-type]


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
