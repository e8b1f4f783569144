"""How a session of backend ``"MPI"`` begins: from ``init_rpc`` to a running agent.

``prepare`` runs first, in our ``init_rpc``: everything that one rank can find wrong by itself, before it takes part in
anything collective. torch's own ``init_rpc`` then comes to ``init_backend``, which forms the group. From the moment the
communicator is duplicated, an error on one rank is raised on all of them.
"""

from __future__ import annotations

import functools
import os
import platform
import socket
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.rpc import internal

from . import __version__, _agreement, _devices, _exit, _extension, _launch, _mpi, _rendezvous, _torch_api, _world
from ._group import Group
from ._torch_api import DEFAULT_INIT_METHOD, DEFAULT_RPC_TIMEOUT, RpcBackendOptions, Store, WorkerInfo
from .options import MPIRpcBackendOptions

if TYPE_CHECKING:
    from . import _C, _pickler, _session
    from ._torch_api import RpcAgent


class InitCall(NamedTuple):
    """The arguments of torch's ``init_rpc``, completed."""

    name: str
    rank: int
    world_size: int
    rpc_backend_options: MPIRpcBackendOptions


def construct_options(
    rpc_timeout: float = DEFAULT_RPC_TIMEOUT, init_method: str = DEFAULT_INIT_METHOD, **given: Any
) -> MPIRpcBackendOptions:
    """Torch's option handler; also called, without arguments, for every backend when torch infers one from options."""
    init_method = without_torchs_default(init_method)
    if rpc_timeout == DEFAULT_RPC_TIMEOUT and init_method == _rendezvous.DEFAULT_URL and not given:
        try:
            return MPIRpcBackendOptions()
        except ValueError:
            # Only the environment can be wrong here. A TensorPipe program that lets torch infer its backend must not
            # fail of that; one that uses ours gets the error from the constructor in prepare() or init_backend().
            return _UnusableOptions()
    return MPIRpcBackendOptions(rpc_timeout=rpc_timeout, init_method=init_method, **given)


def without_torchs_default(init_method: str) -> str:
    """Ours, where torch has filled in its own default, which asks for MASTER_ADDR."""
    return _rendezvous.DEFAULT_URL if init_method == DEFAULT_INIT_METHOD else init_method


class _UnusableOptions(MPIRpcBackendOptions):
    def __init__(self) -> None:
        RpcBackendOptions.__init__(self)


def prepare(name: Any, rank: Any, world_size: Any, options: Any) -> InitCall:
    """Checks the arguments of ``init_rpc``, loads MPI, and fills in what MPI knows.

    Local: it waits for other ranks only in MPI_Init, and there only under a launcher.

    Raises:
        RuntimeError: RPC is initialised already, the name is not valid, or MPI is not usable (see ``_mpi.load``).
        TypeError: options of another backend.
        ValueError: rank or world size are missing, or disagree with the communicator.
    """
    _mpi.refuse_forked_child()
    if _torch_api.is_current_rpc_agent_set():
        raise RuntimeError("RPC is already initialized")
    _check_name(name)
    options = MPIRpcBackendOptions() if options is None else _checked_options(options)
    rank = integer("rank", -1 if rank is None else rank)
    world_size = integer("world_size", -1 if world_size is None else world_size)
    rank, world_size = _complete_place(name, options, rank, world_size)
    if _without_launcher(options, rank, world_size):
        options = _rendezvous.made_interruptible(options)
    _extension.load().forget_autograd_worker_id(rank)
    return InitCall(name, rank, world_size, options)


def _complete_place(name: str, options: MPIRpcBackendOptions, rank: int, world_size: int) -> tuple[int, int]:
    """Rank and world size, checked against what MPI or torchrun says."""
    if options.comm is None:
        rank, world_size = _launch.complete(rank, world_size)
    if _without_launcher(options, rank, world_size):
        if not 0 <= rank < world_size:
            raise ValueError(
                f"init_rpc was given rank={rank}, world_size={world_size}. In a process that no MPI launcher started "
                "it needs both, the rank from 0 to world_size - 1."
            )
        _exit.watch_errors(_whereabouts(name, rank), job=None)
        return rank, world_size
    _launch.refuse()
    mpi = _mpi.load(options.init_timeout)
    comm = _communicator(mpi, options)
    _exit.watch_errors(
        _whereabouts(name, comm.Get_rank()),
        job=mpi if mpi.MPI.COMM_WORLD.Get_size() > 1 and not _world.is_formed() else None,
    )
    _launch.check(mpi, rank, world_size, alone_on_purpose=options.comm is not None or world_size == 1)
    _check_place(rank, world_size, comm.Get_rank(), comm.Get_size(), options)
    return comm.Get_rank(), comm.Get_size()


def _whereabouts(name: str, rank: int) -> str:
    return f"worker '{name}' (rank {rank} on host {socket.gethostname()})"


def _without_launcher(options: MPIRpcBackendOptions, rank: int, world_size: int) -> bool:
    return options.comm is None and _launch.through_store(rank, world_size)


def _gather(store: Store, call: InitCall) -> Group:
    options = call.rpc_backend_options
    node, limit = socket.gethostname(), options.init_timeout
    if _without_launcher(options, call.rank, call.world_size):
        node = options.node or node
        return Group(*_world.gather(store, call.name, node, call.rank, call.world_size, limit), node, limit)
    mpi = _mpi.load(limit)
    communicator = _extension.load().Communicator.duplicate(
        mpi.runtime, mpi.handle(_communicator(mpi, options)), limit, None
    )
    return Group(communicator, None, node, limit)


def init_backend(
    store: Store,
    name: str,
    rank: int,
    world_size: int | None,
    rpc_backend_options: RpcBackendOptions,
) -> RpcAgent:
    """Torch's init handler: forms the group and starts the agent.

    Collective over the group. Raises the same error on all ranks when they do not fit together. The store is used only
    where no launcher brings the ranks together.
    """
    # Again, because torch's own init_rpc or _init_rpc_backend may have been called past our wrapper.
    call = prepare(name, rank, world_size, rpc_backend_options)
    group = _gather(store, call)
    made: list[_C.Neighbours] = []

    def describe() -> _agreement.Member:
        made.append(_extension.load().Neighbours())
        return _describe(call, group.node, made[0].address)

    members = group.on_all_ranks(describe)
    neighbours = made.pop()
    try:
        _agreement.check(members)
        placement = _place_devices(call.name, [member.wishes for member in members], group.on_all_ranks)
    except Exception:
        group.communicator.free()
        raise
    # Here and not above, because they import the extension.
    from . import _pickler, _session

    options = call.rpc_backend_options
    pickler = None if options.pickler == "pickle" else _pickler.RpcPickler(options.pickler == "cloudpickle")
    agents: list[_session.Agent] = []

    def make_agent() -> tuple[bool, int]:
        agents.append(_make_agent(store, call, group, neighbours, members, placement, pickler))
        return neighbours.reaches_all, neighbours.host

    # When this returns, every rank has its agent, and what a faster rank sends to one that has not started it yet waits
    # in MPI. So there is no need of a first round of RPCs, which TensorPipe has here to set up its connections.
    reached = group.on_all_ranks(make_agent)
    if all(reaches_all for reaches_all, _ in reached):
        neighbours.ring_each_other()
    agent = agents.pop()
    hosts_of_ranks = [host for _, host in reached]
    if len(set(hosts_of_ranks)) > 1:
        _watch_other_hosts(agent, neighbours, hosts_of_ranks, options.heartbeat_timeout, group.on_all_ranks)
    try:
        _session.begin(agent, pickler, _whereabouts_in(call, members), _mpi.open_library())
        _torch_api.init_rpc_states(agent)
    except BaseException:
        agent.shutdown()
        if _torch_api.is_current_rpc_agent_set():
            _torch_api.reset_current_rpc_agent()
        raise
    return agent


def _whereabouts_in(call: InitCall, members: Sequence[_agreement.Member]) -> str:
    return f"{WorkerInfo(call.name, call.rank)} (rank {call.rank} on host {members[call.rank].host})"


def _make_agent(
    store: Store,
    call: InitCall,
    group: Group,
    neighbours: _C.Neighbours,
    members: Sequence[_agreement.Member],
    placement: _devices.Placement,
    pickler: _pickler.RpcPickler | None,
) -> _session.Agent:
    from . import _remote_errors, _session

    options = call.rpc_backend_options
    names = [member.name for member in members]
    whereabouts = _whereabouts_in(call, members)
    nodes = len({member.node for member in members})
    return _session.agent_class(options, store)(
        group.communicator,
        names,
        [member.host for member in members],
        neighbours,
        # Those of other nodes are no neighbours, also where this process could reach their memory.
        [member.address if member.node == members[call.rank].node else "" for member in members],
        _agent_options(options, nodes, placement, names),
        _session.make_run_function(whereabouts),
        _session.make_serialize(internal.serialize if pickler is None else pickler.serialize, whereabouts),
        functools.partial(_remote_errors.pass_on, whereabouts=whereabouts),
        None if pickler is None else pickler.plain,
        _session.tell_of_loss,
    )


def _watch_other_hosts(
    agent: _C.MPIAgent,
    neighbours: _C.Neighbours,
    hosts: list[int],
    heartbeat_timeout: float,
    on_all_ranks: Callable[[Callable[[], Any]], list[Any]],
) -> None:
    """See ``Note [Liveness across hosts]`` in ``liveness/watch.h``. Collective."""
    watch = _extension.load().HostWatch()
    offers = on_all_ranks(lambda: (watch.address, os.urandom(32)))
    addresses, secrets = [address for address, _ in offers], [secret for _, secret in offers]
    on_all_ranks(lambda: agent.watch_other_hosts(watch, neighbours, addresses, hosts, secrets[0], heartbeat_timeout))


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise RuntimeError(f"Argument {name} must be of type {str} but got type {type(name)}")
    WorkerInfo(name, 0)  # raises torch's error for a name that torch does not take


def _checked_options(options: Any) -> MPIRpcBackendOptions:
    if not isinstance(options, RpcBackendOptions):
        raise TypeError("Argument rpc_backend_options must be an instance of RpcBackendOptions")
    if isinstance(options, _UnusableOptions):
        MPIRpcBackendOptions()  # raises what is wrong with the environment
    if not isinstance(options, MPIRpcBackendOptions):
        raise TypeError(
            f'backend "MPI" takes torch_rpc_mpi.MPIRpcBackendOptions as rpc_backend_options, but got {options!r}'
        )
    return options


def integer(what: str, value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"init_rpc: {what} must be an integer, but got {value!r} of type {type(value).__name__}")
    return int(value)


def _communicator(mpi: _mpi.LoadedMPI, options: MPIRpcBackendOptions) -> Any:
    comm = options.checked_comm()
    return mpi.MPI.COMM_WORLD if comm is None else comm


def _check_place(rank: int, world_size: int, actual_rank: int, actual_size: int, options: MPIRpcBackendOptions) -> None:
    """Raises ValueError when the rank or world size that the user gave (-1: not given) is not the communicator's."""
    where = "MPI.COMM_WORLD" if options.comm is None else "the communicator given as comm"
    remedy = "Leave rank and world_size out of init_rpc, MPI knows them" + (
        ", or pass comm= for a group of fewer or reordered ranks." if options.comm is None else "."
    )
    if rank not in (-1, actual_rank):
        raise ValueError(
            f"init_rpc was given rank={rank}, but this process is rank {actual_rank} of {actual_size} in {where}. "
            f"{remedy}"
        )
    if world_size not in (-1, actual_size):
        raise ValueError(
            f"init_rpc was given world_size={world_size}, but there are {actual_size} ranks in {where}. {remedy}"
        )


def _describe(call: InitCall, node: str, address: str) -> _agreement.Member:
    options = call.rpc_backend_options
    return _agreement.Member(
        name=call.name,
        host=socket.gethostname(),
        node=node,
        pid=os.getpid(),
        address=address,
        agreed={
            "version of torch_rpc_mpi": __version__,
            "version of torch": ".".join(torch.__version__.split(".")[:2]),
            "architecture": platform.machine(),  # frames travel as they lie in memory
            "eager_limit (bytes)": options.eager_limit,
            "bulk_chunk (bytes)": options.bulk_chunk,
            "heartbeat_timeout (seconds)": options.heartbeat_timeout,
            "device_path": options.device_path,
        },
        wishes=_devices.Wishes(call.name, options.device_maps, options.devices),
    )


def _place_devices(
    name: str, wishes: list[_devices.Wishes], on_all_ranks: Callable[[Callable[[], Any]], list[Any]]
) -> _devices.Placement:
    """Collective, but only where some rank wants devices: to ask for them loads the driver."""
    if not _devices.are_used(wishes):
        _devices.check(wishes, [{} for _ in wishes])
        return _devices.Placement([], {}, {})
    types = _devices.types_in(wishes)
    counts = on_all_ranks(lambda: {device_type: _devices.count(device_type) for device_type in types})
    _devices.check(wishes, counts)
    placement = _devices.place(name, wishes)
    on_all_ranks(lambda: _devices.initialize(placement.devices))
    return placement


def _agent_options(
    options: MPIRpcBackendOptions, nodes: int, placement: _devices.Placement, names: list[str]
) -> _C.AgentOptions:
    extension = _extension.load()
    agent_options: _C.AgentOptions = extension.AgentOptions()
    for name in options.of_agent:
        setattr(agent_options, name, getattr(options, name))
    for device_type, (library, prefix) in _devices.runtimes().items():
        extension.register_device_runtime(device_type, library, prefix)
    agent_options.devices = placement.devices
    agent_options.device_memory = _devices.memory(placement.devices)
    agent_options.device_names = _devices.names(placement.devices) if options.device_path == "auto" else []
    if placement.requests or placement.responses:
        agent_options.device_maps = [
            (dict(placement.requests.get(name, {})), dict(placement.responses.get(name, {}))) for name in names
        ]
    mpi = _mpi.open_library()
    agent_options.any_source = mpi.takes_any_source(nodes)
    agent_options.mpi_takes_device_memory = options.device_path == "mpi" or (
        options.device_path == "auto" and placement.devices != [] and mpi.takes_memory_of(placement.devices[0].type)
    )
    return agent_options
