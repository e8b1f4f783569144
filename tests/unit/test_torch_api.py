"""What is relied on of torch where it is private: one test for each name of torch_rpc_mpi/_torch_api.py.

Those that need a session share one over TensorPipe, in a child process: RRefs and profilers leave traces.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import re
import tempfile
import threading
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.rpc as rpc
from torch.distributed.rpc import api, backend_registry, internal
from torch.distributed.rpc.internal import RPCExecMode
from unit_fakes import RunPython

import torch_rpc_mpi
from torch_rpc_mpi import _torch_api

PACKAGE = Path(torch_rpc_mpi.__file__).parent
UNSET = -1.0  # a timeout


class Check(NamedTuple):
    function: Callable[[str], None]
    in_session: bool


CHECKS: dict[str, Check] = {}


def relied_on(*names: str, in_session: bool = False) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Registers what checks these names; it takes the name."""

    def register(function: Callable[[str], None]) -> Callable[[str], None]:
        CHECKS.update(dict.fromkeys(names, Check(function, in_session)))
        return function

    return register


def names_of_module() -> list[str]:
    """Those that others use; Place and Replacements are no names of torch's."""
    names = []
    for node in ast.parse(Path(_torch_api.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.name == alias.asname]
        elif isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names += [str(target.id) for target in getattr(node, "targets", None) or [node.target]]
    return names


@pytest.fixture(scope="module")
def results_in_session() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("name", names_of_module())
def test_name(name: str, results_in_session: dict[str, str], run_forked: RunPython) -> None:
    check = CHECKS[name]
    if not check.in_session:
        check.function(name)
        return
    if not results_in_session:
        printed = run_forked("import test_torch_api; test_torch_api.check_in_session()")
        results_in_session.update(json.loads(printed.splitlines()[-1]))
    if error := results_in_session[name]:
        pytest.fail(error, pytrace=False)


def check_in_session() -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{tempfile.mkdtemp()}/store")
    rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=options)
    results = {}
    for name, check in CHECKS.items():
        if check.in_session:
            results[name] = ""
            try:
                check.function(name)
            except Exception:
                results[name] = traceback.format_exc()
    rpc.shutdown()
    print(json.dumps(results))


def names_used_by(function: Any) -> set[str]:
    """The globals and attributes that a function, and those defined in it, look up when they run."""
    names: set[str] = set()
    codes: list[CodeType] = [inspect.unwrap(function).__code__]
    for code in codes:
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)


@contextlib.contextmanager
def recorded(name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Puts a function in a place that does what torch's does, and yields the arguments that it is called with."""
    place = getattr(_torch_api, name)
    torchs, calls = place.current, []

    def ours(*args: Any, **kwargs: Any) -> Any:
        calls.append((*args, kwargs) if kwargs else args)
        return torchs(*args, **kwargs)

    replacements = _torch_api.Replacements()
    replacements.make({place: ours})
    try:
        yield calls
    finally:
        replacements.undo()
    assert place.current is torchs


def double(x: Any) -> Any:
    return x * 2


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases deprecate it
        return torch.jit.script(triple)


def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


# Public classes, imported from where type checkers see them


@relied_on("FileStore", "HashStore", "PrefixStore", "Store", "TCPStore")
def stores(name: str) -> None:
    assert getattr(_torch_api, name) is getattr(torch.distributed, name)


@relied_on("PyRRef", "RpcAgent", "RpcBackendOptions", "TensorPipeAgent", "WorkerInfo")
def classes_of_rpc(name: str) -> None:
    assert getattr(_torch_api, name) is getattr(rpc, name)


@relied_on("Future")
def future(name: str) -> None:
    """Calls return it, not its subclass; what is set on it holds for both."""
    assert issubclass(torch.futures.Future, _torch_api.Future)


# Places


@relied_on("BACKEND_TYPE")
def backend_type(name: str) -> None:
    """Registration makes a new enum, which init_rpc looks for here."""
    assert "BackendType" in names_used_by(rpc.init_rpc)
    assert "BackendType" in names_used_by(backend_registry.register_backend)
    assert _torch_api.BACKEND_TYPE.current is rpc.BackendType


@relied_on("RENDEZVOUS_TCP_STORE")
def _(name: str) -> None:
    """torch's rendezvous makes its store by this name, and a store can be told not to wait for the others."""
    with recorded(name) as calls:
        store, rank, size = next(torch.distributed.rendezvous("tcp://localhost:0?use_libuv=1", 0, 1))
    assert (rank, size) == (0, 1)
    assert len(calls) == 1
    assert calls[0][0]["host_name"] == "localhost"
    assert isinstance(store, _torch_api.Store)
    alone = _torch_api.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)  # would wait for ever
    assert alone.port > 0


@relied_on("INIT_RPC")
def init_rpc(name: str) -> None:
    assert parameters(rpc.init_rpc) == ["name", "backend", "rank", "world_size", "rpc_backend_options"]


@relied_on("INIT_BACKEND")
def init_backend(name: str) -> None:
    """Whatever makes an agent comes to it, in the end."""
    assert "init_backend" in names_used_by(rpc._init_rpc_backend)
    assert "_init_rpc_backend" in names_used_by(rpc.init_rpc)
    assert parameters(backend_registry.init_backend) == ["backend", "args", "kwargs"]
    assert parameters(backend_registry._tensorpipe_init_backend_handler) == [
        "store", "name", "rank", "world_size", "rpc_backend_options",
    ]  # fmt: skip


@relied_on("TENSORPIPE_OPTIONS_INIT")
def tensorpipe_options_init(name: str) -> None:
    """It can be replaced, also for subclasses, and its instances take attributes of any name."""

    class Options(rpc.TensorPipeRpcBackendOptions):
        pass

    with recorded(name) as calls:
        options = Options(_transports=["uv"], num_worker_threads=3)
    assert calls == [(options, {"_transports": ["uv"], "num_worker_threads": 3})]
    options.of_any_name = 4
    assert (options.of_any_name, options.num_worker_threads) == (4, 3)


@relied_on("INVOKE_RPC", in_session=True)
def invoke_rpc(name: str) -> None:
    """rpc_sync and rpc_async make every call by it, and rpc_sync waits at once for what it returns."""
    with recorded(name) as calls:
        assert rpc.rpc_sync("alone", double, args=(4,)) == 8
        assert rpc.rpc_async("alone", double, args=(4,), timeout=5).wait() == 8
    assert calls == [
        ("alone", double, RPCExecMode.SYNC, (4,), None, UNSET),
        ("alone", double, RPCExecMode.ASYNC, (4,), None, 5),
    ]


@relied_on("INVOKE_RPC_BUILTIN", "INVOKE_REMOTE_BUILTIN", in_session=True)
def invoke_builtin(name: str) -> None:
    x = torch.ones(2)
    with recorded(name) as calls:
        rpc.rpc_sync("alone", torch.add, args=(x, 1))
        rpc.remote("alone", torch.add, args=(x, 1)).to_here()
    assert calls == [(rpc.get_worker_info("alone"), "aten::add", UNSET, x, 1)]


@relied_on("INVOKE_RPC_PYTHON_UDF", "INVOKE_REMOTE_PYTHON_UDF", in_session=True)
def invoke_python_udf(name: str) -> None:
    x = torch.ones(2)
    with recorded(name) as calls:
        rpc.rpc_sync("alone", double, args=(x,))
        rpc.remote("alone", double, args=(x,)).to_here()
    pickled, tensors = internal.serialize(internal.PythonUDF(double, (x,), {}))
    assert calls == [(rpc.get_worker_info("alone"), pickled, tensors, UNSET, False)]


@relied_on("INVOKE_RPC_TORCHSCRIPT", in_session=True)
def invoke_rpc_torchscript(name: str) -> None:
    x, function = torch.ones(2), scripted()
    with recorded(name) as calls:
        rpc.rpc_sync("alone", function, args=(x,))
    assert calls == [("alone", _torch_api.qualified_name(function), (x,), {}, UNSET, False)]


@relied_on("INVOKE_REMOTE_TORCHSCRIPT", in_session=True)
def invoke_remote_torchscript(name: str) -> None:
    x, function = torch.ones(2), scripted()
    with recorded(name) as calls:
        rpc.remote("alone", function, args=(x,)).to_here()
    assert calls == [("alone", _torch_api.qualified_name(function), UNSET, False, x)]


@relied_on("DEFAULT_PICKLER", in_session=True)
def default_pickler(name: str) -> None:
    """All calls are pickled with what is there."""
    pickled = []

    class Pickler:
        def serialize(self, obj: Any) -> Any:
            pickled.append(obj)
            return internal.serialize(obj)

    replacements = _torch_api.Replacements()
    replacements.make({_torch_api.DEFAULT_PICKLER: Pickler()})
    rpc.rpc_sync("alone", double, args=(4,))
    rpc.remote("alone", double, args=(4,)).to_here()
    replacements.undo()
    assert pickled == [internal.PythonUDF(double, (4,), {})] * 2


@relied_on("INTERNAL_RPC_PICKLER")
def internal_rpc_pickler(name: str) -> None:
    """It is the default one again after another was used for a while."""
    torchs = _torch_api.INTERNAL_RPC_PICKLER.current
    with api._use_rpc_pickler(theirs := object()):
        assert _torch_api.DEFAULT_PICKLER.current is theirs
    assert _torch_api.DEFAULT_PICKLER.current is torchs


@relied_on("FUTURE_ADD_DONE_CALLBACK", "FUTURE_THEN", "FUTURE_WAIT")
def future_methods(name: str) -> None:
    """They can be replaced, for ``torch.futures.Future`` as well."""
    future: torch.futures.Future[int] = torch.futures.Future()
    future.set_result(4)
    with recorded(name) as calls:
        future.add_done_callback(double)
        future.then(str).wait()
    assert len(calls) == 1


@relied_on("RREF_LOCAL_VALUE", "RREF_TO_HERE", in_session=True)
def rref_methods(name: str) -> None:
    """They can be replaced, for ``rpc.RRef`` as well."""
    rref = rpc.RRef(4)
    with recorded(name) as calls:
        assert rref.local_value() == rref.to_here() == 4
    assert len(calls) == 1


@relied_on("ALL_GATHER", in_session=True)
def all_gather(name: str) -> None:
    """Barriers and shutdown wait by it; the result is by name."""
    with recorded(name) as calls:
        assert api._all_gather(7) == {"alone": 7}
        api._barrier({"alone"})
        api._wait_all_workers()
    assert calls == [(7,), (None, {"alone"}), (None, {"timeout": 0})]
    assert parameters(api._all_gather) == ["obj", "worker_names", "timeout"]


@relied_on("ALL_GATHER_SEQUENCE_ID", in_session=True)
def all_gather_sequence_id(name: str) -> None:
    replacements = _torch_api.Replacements()
    replacements.make({_torch_api.ALL_GATHER_SEQUENCE_ID: (ours := {})})
    api._all_gather(7)
    api._all_gather(7)
    replacements.undo()
    assert ours == {"alone": 2}


@relied_on("ALL_GATHER_STATES", "AllGatherStates", in_session=True)
def all_gather_states(name: str) -> None:
    """Everyone waits on the event of its state, which is made when it is first asked for and taken away at the end."""
    waits = []

    class Signal(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    class States(_torch_api.AllGatherStates):
        def __init__(self) -> None:
            super().__init__()
            assert type(self.proceed_signal) is threading.Event
            self.proceed_signal = Signal()

    replacements = _torch_api.Replacements()
    replacements.make({_torch_api.ALL_GATHER_STATES: (ours := defaultdict(States))})
    api._all_gather(7)
    api._all_gather(7, timeout=5)
    replacements.undo()
    assert waits == [None, 5]
    assert not ours


@relied_on("DELETE_RREFS", "WAIT_ALL_WORKERS")
def steps_of_shutdown(name: str) -> None:
    """Both are looked up when they are called."""
    assert getattr(_torch_api, name).name in names_used_by(api.shutdown)
    assert parameters(api._wait_all_workers) == ["timeout"]


# Used as it is


@relied_on("DEFAULT_INIT_METHOD", "DEFAULT_NUM_WORKER_THREADS", "DEFAULT_RPC_TIMEOUT")
def defaults(name: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions()
    assert options.num_worker_threads == _torch_api.DEFAULT_NUM_WORKER_THREADS == 16
    assert options.init_method == _torch_api.DEFAULT_INIT_METHOD == "env://"
    assert options.rpc_timeout == _torch_api.DEFAULT_RPC_TIMEOUT == 60


@relied_on("InternalRPCPickler", "torchs_pickler")
def pickler(name: str) -> None:
    """One of the kind is torch's; subclasses override serialize() and inherit deserialize()."""
    assert type(_torch_api.torchs_pickler) is _torch_api.InternalRPCPickler
    x = torch.ones(2)
    data, tensors = _torch_api.InternalRPCPickler().serialize([x, 4])
    assert isinstance(data, bytes)
    assert tensors == [x]
    assert _torch_api.torchs_pickler.deserialize(data, tensors) == [x, 4]


@relied_on("reducers_of")
def reducers_of(name: str) -> None:
    """A dictionary that stays the same object."""
    pickler = _torch_api.InternalRPCPickler()
    reducers = _torch_api.reducers_of(pickler)
    pickler._register_reducer(Path, str)
    assert reducers == {Path: str}


def peek() -> list[torch.Tensor]:
    return list(_torch_api.tensor_tables.recv_tables)


class Peek:
    def __reduce__(self) -> Any:
        return peek, ()


@relied_on("tensor_tables")
def tensor_tables(name: str) -> None:
    """What a message's tensors are read from while it is unpickled, in that thread."""
    data, tensors = internal.serialize([torch.ones(2), Peek()])
    x, seen = internal.deserialize(data, tensors)
    assert seen == [x]
    assert not hasattr(_torch_api.tensor_tables, "recv_tables")


@relied_on("handle_exception")
def handle_exception(name: str) -> None:
    """Raises what a RemoteException tells of, and nothing for other values."""
    with pytest.raises(ValueError, match=r"^a\nb$"):
        _torch_api.handle_exception(internal.RemoteException("a\\nb", ValueError))
    _torch_api.handle_exception("a")


@relied_on("find_builtin")
def find_builtin(name: str) -> None:
    assert _torch_api.find_builtin(torch.add) == "aten::add"
    assert _torch_api.find_builtin(double) is None


@relied_on("builtin_names")
def builtin_names(name: str) -> None:
    """The table that torch looks into, by identity; operators that come later are put into it."""
    table = _torch_api.builtin_names()
    assert table[id(torch.add)] == "aten::add"
    assert id(double) not in table
    torch.jit._builtins._register_builtin(double, "aten::neg")
    try:
        assert table[id(double)] == _torch_api.find_builtin(double) == "aten::neg"
    finally:
        del table[id(double)]


@relied_on("qualified_name", in_session=True)
def qualified_name(name: str) -> None:
    function = scripted()
    assert _torch_api.qualified_name(function) == f"__torch__.{__name__}.triple"
    assert function.qualified_name == _torch_api.qualified_name(function)  # which direct calls ask for


@relied_on("async_execution", "ASYNC_EXECUTION")
def async_execution(name: str) -> None:
    assert _torch_api.ASYNC_EXECUTION in names_used_by(api._invoke_rpc) | set(api._invoke_rpc.__code__.co_consts)
    assert _torch_api.async_execution(rpc.functions.async_execution(double)) is double
    assert _torch_api.async_execution(double) is None


@relied_on("require_initialized")
def require_initialized(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"^RPC has not been initialized"):
        _torch_api.require_initialized(double)(4)


@relied_on("get_current_rpc_agent", "is_current_rpc_agent_set", in_session=True)
def current_rpc_agent(name: str) -> None:
    assert _torch_api.is_current_rpc_agent_set()
    assert isinstance(_torch_api.get_current_rpc_agent(), rpc.TensorPipeAgent)


@relied_on("reset_current_rpc_agent")
def reset_current_rpc_agent(name: str) -> None:
    """The last step of a shutdown."""
    assert "_reset_current_rpc_agent" in names_used_by(api._finalize_shutdown)
    with pytest.raises(RuntimeError, match="not set"):
        _torch_api.reset_current_rpc_agent()


@relied_on("init_rpc_states", in_session=True)
def init_rpc_states(name: str) -> None:
    """Notes the names of all workers; makes the agent the current one and starts it, if there is none."""
    api._ALL_WORKER_NAMES = set()
    _torch_api.init_rpc_states(_torch_api.get_current_rpc_agent())
    assert {"alone"} == api._ALL_WORKER_NAMES
    assert {"_is_current_rpc_agent_set", "_set_and_start_rpc_agent"} <= names_used_by(api._init_rpc_states)


@relied_on("TO_WORKER_INFO", in_session=True)
def to_worker_info(name: str) -> None:
    """All calls look the callee up by it."""
    info = _torch_api.TO_WORKER_INFO.current("alone")
    assert (info.name, info.id) == ("alone", 0)
    assert _torch_api.TO_WORKER_INFO.current(0) == _torch_api.TO_WORKER_INFO.current(info) == info
    with pytest.raises(RuntimeError):
        _torch_api.TO_WORKER_INFO.current("nobody")
    with recorded(name) as calls:
        rpc.rpc_sync("alone", double, args=(4,))
        rpc.remote("alone", double, args=(4,)).to_here()
    assert calls == [("alone",), ("alone",)]


@relied_on("should_profile", "enable_rpc_profiler", "end_of_record", in_session=True)
def profiler(name: str) -> None:
    """The record of a call ends with the future that is returned for the call's own."""
    info = rpc.get_worker_info("alone")
    assert not _torch_api.should_profile()
    with _torch_api.enable_rpc_profiler(False, None, double, RPCExecMode.ASYNC, info) as record:
        assert record is None
    with torch.autograd.profiler_legacy.profile() as profile:
        assert _torch_api.should_profile()
        with _torch_api.enable_rpc_profiler(True, None, double, RPCExecMode.ASYNC, info) as record:
            call = internal.serialize(internal.PythonUDF(double, (4,), {}))
            future = _torch_api.INVOKE_RPC_PYTHON_UDF.current(info, *call, UNSET, False)
        assert _torch_api.end_of_record(record)(future).wait() == 8
    assert f"rpc_async#{double.__qualname__}(alone -> alone)" in [event.name for event in profile.function_events]


@relied_on("waiting_for_all")
def waiting_for_all(name: str) -> None:
    """The futures that this thread is to wait for at the end of ``_wait_all()``."""
    done: torch.futures.Future[int] = torch.futures.Future()
    done.set_result(4)
    with api._wait_all():
        assert _torch_api.waiting_for_all.future_list == []
        _torch_api.waiting_for_all.future_list.append(done)
    assert "wait_all" in names_used_by(api._wait_all)
    assert not hasattr(_torch_api.waiting_for_all, "future_list")


@relied_on("has_rendezvous_handler")
def has_rendezvous_handler(name: str) -> None:
    assert _torch_api.has_rendezvous_handler("env")
    assert not _torch_api.has_rendezvous_handler("nonsense")


@relied_on("typed_storage", "untyped_storage_of")
def typed_storages(name: str) -> None:
    """Neither warns, which pytest would make an error."""
    untyped = torch.ones(2).untyped_storage()
    typed = _torch_api.typed_storage(untyped, torch.float32)
    assert type(typed) is torch.storage.TypedStorage
    assert _torch_api.untyped_storage_of(typed) is untyped


@relied_on("fork_rref", "id_of_fork", "rref_of_fork", in_session=True)
def forks_of_rrefs(name: str) -> None:
    rrefs = rpc.RRef(3), rpc.RRef(4)
    first, fork = map(_torch_api.fork_rref, rrefs)
    (maker, number), (_, before) = _torch_api.id_of_fork(fork), _torch_api.id_of_fork(first)
    assert maker == rpc.get_worker_info().id
    assert number == before + 1
    assert isinstance(fork, tuple)
    assert _torch_api.rref_of_fork(first).to_here() == 3
    assert _torch_api.rref_of_fork(fork).to_here() == 4


@relied_on("future_of_rref", "set_profiling_future", in_session=True)
def futures_of_rrefs(name: str) -> None:
    """The first completes when the owner has the value; RRefs wait for the other before they say that they exist."""
    rref = rpc.remote("alone", double, args=(4,))
    future = _torch_api.future_of_rref(rref)
    future.wait()
    _torch_api.set_profiling_future(rref, future)
    rref._get_profiling_future().wait()
    assert rref.to_here() == 8


# The rest of the package


def private(name: str) -> bool:
    return re.match(r"_[a-zA-Z]", name) is not None and name not in ("_fields", "_replace")  # of named tuples


def root_of(node: ast.AST) -> str | None:
    """``a`` of ``a.b.c``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def torchs_business(source: str) -> list[str]:
    """Where a module touches what is private in something that is not its own, or assigns to a module of torch's."""
    found: list[tuple[int, str]] = []
    own, torchs = {"self", "cls"}, set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                path = f"{module}.{alias.name}".strip(".")
                bound = alias.asname or alias.name.partition(".")[0]
                if getattr(node, "level", 0) or path.partition(".")[0] != "torch":
                    own.add(bound)
                    continue
                torchs.add(bound)
                if any(map(private, path.split("."))):
                    found.append((node.lineno, path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if private(node.attr) and root_of(node) not in own:
                found.append((node.lineno, ast.unparse(node)))
            elif isinstance(node.ctx, ast.Store) and root_of(node) in torchs:
                found.append((node.lineno, f"{ast.unparse(node)} ="))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "attr" in node.func.id:
            named = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
            if any(map(private, named)) or (node.func.id == "setattr" and root_of(node.args[0]) in torchs):
                found.append((node.lineno, ast.unparse(node)))
    return [f"line {line}: {what}" for line, what in sorted(found)]


OTHERS = [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py*")) if path.suffix in (".py", ".pyi")]
OTHERS.remove("_torch_api.py")


@pytest.mark.parametrize("module", OTHERS)
def test_no_other_module_touches_private_names(module: str) -> None:
    assert torchs_business((PACKAGE / module).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from torch._C import Future",
        "from torch.distributed.rpc import _invoke",
        "import torch._jit_internal",
        "import torch\ntorch._C.Future",
        "def f(rref):\n    rref._serialize()",
        "f()._name",
        "hasattr(function, '_wrapped')",
        "import torch.distributed.rpc as rpc\nrpc.init_rpc = None",
        "from torch.distributed.rpc import api\nsetattr(api, name, value)",
    ],
)
def test_what_touches_private_names_is_found(source: str) -> None:
    assert len(torchs_business(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from . import _C\n_C._x",
        "import sys\nsys._current_frames()",
        "self._x = 1",
        "a.__dict__",
        "error._replace(a=1)",
    ],
)
def test_what_is_its_own_is_left_alone(source: str) -> None:
    assert torchs_business(source) == []
