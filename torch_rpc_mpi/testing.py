"""Backend ``"FAULTY_MPI"``: backend ``"MPI"`` with faults that a test asks for.

Importing this module registers it; nothing else does. As with torch's own ``"FAULTY_TENSORPIPE"``, requests can fail
instead of being sent, and can be sent late. Calls of a worker to itself have the same faults::

    import torch_rpc_mpi.testing

    options = torch_rpc_mpi.testing.FaultyMPIRpcBackendOptions(
        messages_to_fail=["RREF_FORK_REQUEST"], num_fail_sends=3, messages_to_delay={"PYTHON_CALL": 1.5}
    )
    rpc.init_rpc(name, backend="FAULTY_MPI", rpc_backend_options=options)

The faults are those of the worker that has the options, in what it sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from . import _extension, _register, backend
from ._option_checks import Option, check_float, check_int
from ._torch_api import DEFAULT_INIT_METHOD, DEFAULT_RPC_TIMEOUT, RpcBackendOptions, Store
from .options import OPTIONS, MPIRpcBackendOptions, signature_of

if TYPE_CHECKING:
    from ._torch_api import RpcAgent

BACKEND_NAME = "FAULTY_MPI"


def _check_message(option: Option, name: object) -> str:
    if not isinstance(name, str):
        raise option.wrong_type(name, "made of names of messages (str)")
    known = _extension.load().message_type_names()
    if name not in known:
        raise ValueError(
            f"FaultyMPIRpcBackendOptions: {option.name}: no message {name!r}; there are {', '.join(known)}"
        )
    return name


def _check_messages(option: Option, value: object) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise option.wrong_type(value, "a list of names of messages")
    return [_check_message(option, name) for name in value]


def _check_delays(option: Option, value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise option.wrong_type(value, "a dictionary from names of messages to seconds")
    return {_check_message(option, name): check_float(option, seconds) for name, seconds in value.items()}


FAULT_OPTIONS: tuple[Option, ...] = (
    Option(
        "messages_to_fail", "list[str]", (), "names",
        "Requests that fail instead of being sent, by the names of torch's message types.",
        _check_messages,
    ),
    Option(
        "messages_to_delay", "dict[str, float]", {}, "seconds",
        "Requests that are sent so much later than they are made. Whoever sends one waits; its timeout begins before.",
        _check_delays, minimum=0,
    ),
    Option(
        "num_fail_sends", "int", 0, "times",
        "How often each message that is to fail does so; then it is sent. Messages of one type and content are one.",
        check_int, minimum=0,
    ),
)  # fmt: skip


class FaultyMPIRpcBackendOptions(MPIRpcBackendOptions):
    """:class:`MPIRpcBackendOptions` and the faults, which :data:`FAULT_OPTIONS` lists with their meaning."""

    __signature__: ClassVar = signature_of([*OPTIONS, *FAULT_OPTIONS])
    table: ClassVar = MPIRpcBackendOptions.table | {option.name: option for option in FAULT_OPTIONS}
    of_agent: ClassVar = (*MPIRpcBackendOptions.of_agent, *(option.name for option in FAULT_OPTIONS))

    messages_to_fail: list[str]
    messages_to_delay: dict[str, float]
    num_fail_sends: int

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)


def _construct_options(
    rpc_timeout: float = DEFAULT_RPC_TIMEOUT, init_method: str = DEFAULT_INIT_METHOD, **given: Any
) -> FaultyMPIRpcBackendOptions:
    return FaultyMPIRpcBackendOptions(
        rpc_timeout=rpc_timeout, init_method=backend.without_torchs_default(init_method), **given
    )


def _init_backend(
    store: Store, name: str, rank: int, world_size: int | None, rpc_backend_options: RpcBackendOptions
) -> RpcAgent:
    if not isinstance(rpc_backend_options, FaultyMPIRpcBackendOptions):
        raise TypeError(
            f'backend "{BACKEND_NAME}" takes torch_rpc_mpi.testing.FaultyMPIRpcBackendOptions as rpc_backend_options, '
            f"but got {rpc_backend_options!r}"
        )
    return backend.init_backend(store, name, rank, world_size, rpc_backend_options)


_register.register_further(BACKEND_NAME, _construct_options, _init_backend)
