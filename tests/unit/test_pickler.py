"""What is pickled how, in one process: the message is read where it was written, as TensorPipe's callee would."""

from __future__ import annotations

import functools

import pytest
from unit_fakes import RunPython

# The agent is a stand-in; __main__ is the program itself, and a name is missing once it is deleted.
PREAMBLE = """
import pathlib, pickle, sys, threading, types
import torch
import torch.distributed.rpc as rpc
from torch.distributed.rpc import api, internal
import unit_fakes
extension = unit_fakes.install_extension(pathlib.Path.cwd())
from torch_rpc_mpi import _pickler, _torch_api, _unsendable, MPIRpcBackendOptions
from torch_rpc_mpi._pickler import MissingInMain, Resendable, RpcPickler

main = sys.modules["__main__"]
auto, always = RpcPickler(), RpcPickler(True)

def call(function, *args, **kwargs):
    return internal.PythonUDF(function, args, kwargs)

def received(message):
    result = internal.deserialize(*message)
    if isinstance(result, Exception) and (text := _pickler.missing_in_main(result, message[0])):
        return MissingInMain(text)  # as csrc/python/request_callback.cpp finds it
    return result

def by_value(data, tensors):
    return _pickler.again(data, tensors) if data.by_value is True else data.by_value()

def run(message):
    udf = received(message)
    return udf.func(*udf.args, **udf.kwargs)

def error_of(function, *args):
    try:
        function(*args)
    except Exception as error:
        return error
    raise AssertionError("no error")

def no_tables():
    assert _pickler._sending.__dict__.get("tensors") is None and _pickler._sending.__dict__.get("rrefs") is None
    assert _pickler._receiving.__dict__.get("tensors") is None and _pickler._receiving.__dict__.get("rrefs") is None
    assert not hasattr(internal._thread_local_tensor_tables, "send_tables")
    assert not hasattr(internal._thread_local_tensor_tables, "recv_tables")

def init(**options):
    rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=MPIRpcBackendOptions(**options))

class Point:
    def __init__(self, x):
        self.x = x
    class Inner:
        pass

def plus(x, y):
    return x + y
"""


@pytest.fixture
def run_pickler(run_forked_with_fakes: RunPython) -> RunPython:
    return functools.partial(run_forked_with_fakes, PREAMBLE)


# Session


def test_shutdown_gives_torch_its_own_names_back(run_pickler: RunPython) -> None:
    run_pickler(
        """
names = (
    "_internal_rpc_pickler", "_default_pickler",
    "_invoke_rpc_python_udf", "_invoke_remote_python_udf", "_invoke_remote_torchscript",
)
for options in ({}, {"pickler": "cloudpickle"}, {"pickler": "auto"}):
    before = {name: getattr(api, name) for name in names}
    init(**options)
    assert isinstance(api._default_pickler, RpcPickler), options
    assert all(getattr(api, name) is not before[name] for name in names)
    assert rpc.rpc_sync("alone", lambda: 1) == 1
    rpc.shutdown()
    assert all(getattr(api, name) is before[name] for name in names)
    assert internal._internal_rpc_pickler is before["_internal_rpc_pickler"]
"""
    )


def test_mode_pickle_leaves_pickling_to_torch(run_pickler: RunPython) -> None:
    run_pickler(
        """
names = ("_internal_rpc_pickler", "_default_pickler", "_invoke_rpc_python_udf")
before = {name: getattr(api, name) for name in names}
init(pickler="pickle")
assert all(getattr(api, name) is before[name] for name in names)
assert "pickle" in str(error_of(rpc.rpc_sync, "alone", lambda: 1))
message = rpc.api._get_current_rpc_agent().serialize([1, torch.ones(2)])
assert message[0] == internal.serialize([1, torch.ones(2)])[0]
rpc.shutdown()
assert all(getattr(api, name) is before[name] for name in names)
"""
    )


def test_names_that_others_have_replaced_since_stay(run_pickler: RunPython) -> None:
    run_pickler(
        """
torchs = api._default_pickler
init()
theirs = internal._InternalRPCPickler()
api._default_pickler = theirs
rpc.shutdown()
assert api._default_pickler is theirs
assert api._internal_rpc_pickler is torchs
"""
    )


def test_an_agent_that_does_not_start_leaves_torchs_names(run_pickler: RunPython) -> None:
    run_pickler(
        """
torchs, names = api._init_rpc_states, (api._default_pickler, api._invoke_rpc_python_udf)
def broken(agent):
    raise MemoryError
api._init_rpc_states = broken
assert type(error_of(init)) is MemoryError
assert (api._default_pickler, api._invoke_rpc_python_udf) == names
"""
    )


def test_picklers_of_the_users_own_end_in_ours(run_pickler: RunPython) -> None:
    run_pickler(
        """
init()
ours = api._default_pickler
with api._use_rpc_pickler(internal._InternalRPCPickler()) as _:
    assert api._default_pickler is not ours
    assert "pickle" in str(error_of(rpc.rpc_sync, "alone", lambda: 1))
assert api._default_pickler is ours
assert rpc.rpc_sync("alone", lambda: 1) == 1
rpc.shutdown()
"""
    )


def test_a_later_tensorpipe_session_has_torchs_pickler(run_pickler: RunPython) -> None:
    run_pickler(
        """
init()
rpc.shutdown()
options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{pathlib.Path.cwd()}/store")
rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=options)
assert "pickle" in str(error_of(rpc.rpc_sync, "alone", lambda: 1))
rpc.shutdown()
"""
    )


# What goes how


def test_what_pickle_can_send_is_pickled_as_torch_does(run_pickler: RunPython) -> None:
    run_pickler(
        """
x = torch.ones(3)
for args in ((), (1, "text", [2.5, {"a": None}]), (x, [x, x + 1]), (types.SimpleNamespace(a=x),)):
    data, tensors = auto.serialize(call(torch.Tensor.add, *args))
    torchs, torchs_tensors = internal.serialize(call(torch.Tensor.add, *args))
    assert type(data) is bytes and b"cloudpickle" not in data
    assert len(data) <= len(torchs) + 40
    assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in torchs_tensors] or len(args) == 2
no_tables()
"""
    )


def test_lambdas_closures_and_local_classes(run_pickler: RunPython) -> None:
    run_pickler(
        """
def outer(n):
    class Local:
        value = n
        def get(self):
            return self.value
    def inner(x):
        return x * n
    return Local, inner

Local, inner = outer(3)
for pickler in (auto, always):
    assert run(pickler.serialize(call(lambda x, y=1: x + y, 2))) == 3
    assert run(pickler.serialize(call(inner, 5))) == 15
    assert run(pickler.serialize(call(Local().get))) == 3
    assert type(run(pickler.serialize(call(Local)))) is Local
    assert received(pickler.serialize(lambda: 7))() == 7  # a result
no_tables()
"""
    )


def test_importable_names_go_by_reference_in_either_mode(run_pickler: RunPython) -> None:
    run_pickler(
        """
for pickler in (auto, always):
    message = pickler.serialize(call(unit_fakes.make_extension, types.SimpleNamespace, lambda: 1))
    function, (other, _), _ = received(message)
    assert function is unit_fakes.make_extension and other is types.SimpleNamespace
"""
    )


def test_tensors_stay_out_of_the_pickle(run_pickler: RunPython) -> None:
    run_pickler(
        """
def holding(*things):
    return lambda: things
x = torch.ones(2 << 20)
weight = torch.nn.Parameter(torch.ones(2 << 20))
view = x[5:1000]
for pickler in (auto, always):
    for things in ((x,), ([x, {"view": view}],), (weight,), (torch.nn.ParameterList([weight]), x)):
        data, tensors = pickler.serialize(call(holding(*things)))
        assert len(data) < 4096, len(data)
        ours = {t.untyped_storage().data_ptr() for t in (x, weight)}
        assert tensors and all(t.untyped_storage().data_ptr() in ours for t in tensors)
    back = run(pickler.serialize(call(holding(x, view, weight))))
    assert back[0] is x and back[1] is view and type(back[2]) is torch.nn.Parameter
    assert torch.equal(back[2], weight)
no_tables()
"""
    )


def test_a_failed_attempt_leaves_its_tensors_out(run_pickler: RunPython) -> None:
    run_pickler(
        """
x, y = torch.ones(2), torch.zeros(2)
data, tensors = auto.serialize(call(max, x, y, lambda: 1))
assert len(tensors) == 2 and tensors[0] is x and tensors[1] is y
"""
    )


def test_script_modules(run_pickler: RunPython) -> None:
    run_pickler(
        """
import warnings
warnings.simplefilter("ignore")
class Doubling(torch.nn.Module):
    def forward(self, x):
        return x * 2
module = torch.jit.trace(Doubling(), torch.ones(1))
for pickler in (auto, always):
    for message in (module, call(max, module), call(lambda: module), [module, lambda: 1]):
        back = received(pickler.serialize(message))
        if isinstance(back, internal.PythonUDF):
            back = back.args[0] if back.args else back.func()
        back = back[0] if isinstance(back, list) else back
        assert torch.equal(back(torch.ones(2)), torch.full((2,), 2.0))
""",
    )


def test_reducers_registered_by_others_are_used(run_pickler: RunPython) -> None:
    run_pickler(
        """
import copyreg, decimal
class ByTorch: pass
class ByCopyreg: pass
init()
for pickler in (auto, always):
    pickler.serialize([lambda: 1])  # its table is made
internal._internal_rpc_pickler._register_reducer(ByTorch, lambda obj: (decimal.Decimal, ("1",)))
copyreg.pickle(ByCopyreg, lambda obj: (decimal.Decimal, ("2",)))
for pickler in (auto, always):
    assert received(pickler.serialize([ByTorch(), ByCopyreg()])) == [1, 2]
    assert received(pickler.serialize([ByTorch(), ByCopyreg(), lambda: 1]))[:2] == [1, 2]
    pickler._register_reducer(type(None), lambda obj: (int, (3,)))  # as any of torch's picklers
rpc.shutdown()
"""
    )


def test_pickling_within_pickling(run_pickler: RunPython) -> None:
    run_pickler(
        """
x, y = torch.ones(1), torch.zeros(1)
class Nested:
    def __reduce__(self):
        data, tensors = auto.serialize(call(lambda: (y, y)))
        assert len(tensors) == 1
        return tuple, ((len(tensors),),)
for pickler in (auto, always):
    (a, inside, b), _ = received(pickler.serialize(([x, Nested(), lambda: y], 0)))
    assert a is x and inside == (1,) and b() is y
no_tables()
"""
    )


# Names of __main__


def test_only_calls_that_name_main_can_be_sent_again(run_pickler: RunPython) -> None:
    run_pickler(
        """
point = Point([1])
for message, resendable in (
    (call(plus, 1, 2), True), (call(max, point), True), (call(max, Point), True), (call(max, [Point.Inner()]), True),
    (call(max, 1, 2), False), (point, False), ([Point], False),
):
    data, _ = auto.serialize(message)
    assert isinstance(data, Resendable) is resendable, message
    assert not isinstance(always.serialize(message)[0], Resendable)
assert run(auto.serialize(call(plus, 1, 2))) == 3
assert received(auto.serialize(call(plus))).func is plus  # by reference where it is known
assert received(auto.serialize(call(max, point))).args[0].x == [1]
"""
    )


def test_a_missing_name_is_reported_and_sent_by_value(run_pickler: RunPython) -> None:
    run_pickler(
        """
function, kind = plus, Point
for name, message, check in (
    ("plus", call(plus, 1, 2), lambda udf: udf.func(*udf.args) == 3),
    ("Point", call(Point, torch.ones(2)), lambda udf: torch.equal(udf.func(*udf.args).x, torch.ones(2))),
    ("Point", call(max, Point([1])), lambda udf: udf.args[0].x == [1]),
    ("Point", call(max, "x" * 70_000, Point([1])), lambda udf: udf.args[1].x == [1]),
    ("Point", call(max, Point.Inner()), lambda udf: type(udf.args[0]).__name__ == "Inner"),
):
    data, tensors = auto.serialize(message)
    again, tensors_again = by_value(data, tensors)
    kept = getattr(main, name)
    delattr(main, name)
    error = received((data, tensors))
    assert type(error) is MissingInMain and repr(name) in str(error).replace("Point.Inner", "Point"), error
    assert "__main__" in str(error)
    assert check(received((again, tensors_again)))
    setattr(main, name, kept)
    assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in tensors_again]
    assert not isinstance(again, Resendable)
"""
    )


def test_the_second_attempt_sends_what_the_first_did(run_pickler: RunPython) -> None:
    run_pickler(
        """
values = [1, 2]
data, tensors = auto.serialize(call(plus, values, torch.ones(1)))
values.append(3)
udf = received(by_value(data, tensors))
assert udf.args[0] == [1, 2]
"""
    )


def test_a_second_attempt_while_another_pickler_is_in_use(run_pickler: RunPython) -> None:
    run_pickler(
        """
data, tensors = auto.serialize(call(plus, 1, 2))
with api._use_rpc_pickler(internal._InternalRPCPickler()):
    assert run(_pickler.again(data, tensors)) == 3
"""
    )


def test_a_missing_name_leaves_no_table_behind(run_pickler: RunPython) -> None:
    run_pickler(
        """
data, tensors = auto.serialize(call(plus, torch.ones(1)))
del main.plus
assert type(received((data, tensors))) is MissingInMain
no_tables()
"""
    )


def test_errors_of_torch_for_importable_names(run_pickler: RunPython) -> None:
    run_pickler(
        """
exec("def here(): return 1", vars(unit_fakes))
for message in (call(unit_fakes.here), call(plus, unit_fakes.here), call(max, unit_fakes.here, lambda: 1)):
    data, tensors = auto.serialize(message)
    kept = unit_fakes.here
    del unit_fakes.here
    result = received((data, tensors))
    assert type(result) is AttributeError and "Default RPC pickler does not serialize" in str(result), result
    unit_fakes.here = kept
"""
    )


def test_a_callee_that_lacks_a_name_lets_go_of_the_rrefs(run_pickler: RunPython) -> None:
    run_pickler(
        """
init()
rref = rpc.RRef(5)
data, tensors = auto.serialize(call(plus, rref, [rref]))
taken = []
torchs = _torch_api.rref_of_fork
_torch_api.rref_of_fork = lambda fork: taken.append(fork) or torchs(fork)
kept = main.plus
del main.plus
assert type(received((data, tensors))) is MissingInMain
assert len(taken) == 1  # once: the call was not unpickled
main.plus = kept
again = by_value(data, tensors)
assert received(again).args[0].to_here() == 5
assert len(taken) == 2 and taken[0] != taken[1]
assert rpc._rref_context_get_debug_info()["num_forks"] == "0"
rpc.shutdown()
"""
    )


# Everything that leads to a name in a pickle: each is written, then its name is deleted.
def test_names_are_found_wherever_they_are(run_pickler: RunPython) -> None:
    run_pickler(
        """
check = _pickler._missing_name
outer = Point
cases = [
    (call(plus), "plus"), (call(max, 1, plus), "plus"), (call(plus, plus, Point), "plus"), (call(plus, Point), "Point"),
    (call(max, {"__main__": plus}), "plus"), (call(max, "plus", "__main__", Point(plus)), "plus"),
    (call(max, Point("plus"), Point(plus)), "plus"), (call(max, [Point.Inner()] * 2, Point.Inner), "Point"),
]
for size in range(65_300, 65_536):  # the end of a frame falls between, or on, any of the opcodes
    cases.append((call(max, b"x" * size, plus), "plus"))
    cases.append((call(max, "x" * (size - 20), Point(1), "y" * 20, plus), "plus"))
missed = []
for message, name in cases:
    datas = [auto._by_reference(message)[0], *(auto.plain.dump_call(message) or ())[:1]]
    kept = getattr(main, name)
    for data in datas:
        assert check(data) is None
        delattr(main, name)
        if check(data) is None:
            missed.append((str(message)[:60], len(data)))
        setattr(main, name, kept)
assert not missed, missed[:3]
for args in (("__main__", "nowhere"), ({"__main__": "nowhere"},), (b"__main__", "x"), ("c__main__\\nnowhere\\n",)):
    assert check(auto._by_reference(call(max, *args))[0]) is None  # only looks like one
"""
    )


def test_protocols_of_other_pythons(run_pickler: RunPython) -> None:
    # Python 3.14 writes protocol 5 by default.
    run_pickler(
        """
for protocol in (4, 5):
    data = pickle.dumps([Point(plus), plus], protocol)
    assert _pickler._missing_name(data) is None
    kept = main.plus
    del main.plus
    assert "plus" in _pickler._missing_name(data)
    main.plus = kept
"""
    )


# Errors


def test_paths_of_what_cannot_be_sent(run_pickler: RunPython) -> None:
    run_pickler(
        """
lock = threading.Lock()
class Config:
    def __init__(self):
        self.size, self.lock = 3, lock
class Holder:
    def __init__(self):
        self.config = Config()
    def run(self):
        pass
def capturing(name):
    return lambda: name
for message, path in (
    (call(max, lock), "args[0]"),
    (call(max, Holder()), "args[0].config.lock"),
    (call(max, 1, {"b": 1, "a": [1, 2, lock]}), "args[1]['a'][2]"),
    (call(max, x=lock), "kwargs['x']"),
    (call(max, x=[lock]), "kwargs['x'][0]"),
    (call(capturing(lock)), "function's variable 'name'"),
    (call(capturing([0, Config()])), "function's variable 'name'[1].lock"),
    (call(lambda: lock), "function's global 'lock'"),
    (call(Holder().run), "function.__self__.config.lock"),
    (call(max, capturing(lock)), "args[0]'s variable 'name'"),
    (lock, "result"),
    (Holder(), "result.config.lock"),
    ([1, (2, {3: lock})], "result[1][1][3]"),
    (capturing(lock), "result's variable 'name'"),
):
    for pickler in (auto, always):
        error = error_of(pickler.serialize, message)
        assert type(error) is TypeError, error
        text = f"{path} (of type _thread.lock) cannot be sent to another worker: cannot pickle"
        assert str(error).startswith(text), error
        assert type(error.__cause__) is TypeError
    no_tables()
"""
    )


def test_kinds_of_errors(run_pickler: RunPython) -> None:
    run_pickler(
        """
class Stubborn:
    def __init__(self, kind):
        self.kind = kind
    def __reduce__(self):
        raise self.kind("I stay here")
class Odd(Exception):
    def __init__(self, text, number=None):
        if number is None and "cannot be sent" in text:
            raise TypeError("takes two")
        super().__init__(text)
for kind, expected in (
    (TypeError, TypeError), (AttributeError, AttributeError), (RuntimeError, RuntimeError),
    (OSError, OSError), (Odd, pickle.PicklingError), (pickle.PicklingError, pickle.PicklingError),
):
    error = error_of(auto.serialize, call(max, [Stubborn(kind)]))
    assert type(error) is expected and str(error).endswith("I stay here"), repr(error)
    assert str(error).startswith("args[0][0] (of type __main__.Stubborn)"), error
"""
    )


def test_the_search_ends_in_cycles_and_in_much(run_pickler: RunPython) -> None:
    run_pickler(
        """
lock = threading.Lock()
cyclic = [1]
cyclic.append(cyclic)
cyclic.append(lock)
for message in (call(max, cyclic), call(max, [[i] for i in range(5000)] + [lock])):
    assert "cannot be sent to another worker: cannot pickle" in str(error_of(auto.serialize, message))
    no_tables()
"""
    )


def test_the_search_passes_variables_without_a_value(run_pickler: RunPython) -> None:
    run_pickler(
        """
def make(lock):
    def function():
        return late, lock
    return function
    late = 1
error = error_of(auto.serialize, call(make(threading.Lock())))
assert str(error).startswith("function's variable 'lock' (of type _thread.lock) cannot be sent"), repr(error)
"""
    )


def test_the_search_passes_objects_that_refuse_to_be_looked_at(run_pickler: RunPython) -> None:
    run_pickler(
        """
class Hostile:
    __slots__ = ("lock",)
    def __init__(self):
        self.lock = threading.Lock()
    def __getattr__(self, name):
        raise RuntimeError("hands off")
error = error_of(auto.serialize, call(max, Hostile()))
assert str(error).startswith("args[0]") and "cannot be sent to another worker: cannot pickle" in str(error), repr(error)
"""
    )


def test_nesting_too_deep_is_pythons_own_error_at_once(run_pickler: RunPython) -> None:
    run_pickler(
        """
deep, with_lambda = [], [lambda: 1]
for _ in range(20_000):
    deep, with_lambda = [deep], [with_lambda]
dumps = []
dump = RpcPickler._dump
RpcPickler._dump = lambda *args: dumps.append(args) or dump(*args)
for pickler in (auto, always):
    for message in (call(max, deep), call(max, with_lambda), deep, with_lambda):
        error = error_of(pickler.serialize, message)
        assert type(error) is RecursionError and "maximum recursion depth" in str(error), repr(error)[:300]
        no_tables()
assert len(dumps) <= 8  # nothing was tried part by part
"""
    )


def test_what_would_arrive_as_something_else_is_refused(run_pickler: RunPython) -> None:
    run_pickler(
        """
pathlib.Path("text").write_text("content")
text = open("text")
for message, path, kind in (
    (call(max, text), "args[0]", "_io.TextIOWrapper"),
    (call(max, {"out": [sys.stdout]}), "args[0]['out'][0]", "_io.TextIOWrapper"),
    (call(lambda: text), "function's global 'text'", "_io.TextIOWrapper"),
    (call(max, memoryview(b"1")), "args[0]", "memoryview"),
    ([text], "result[0]", "_io.TextIOWrapper"),
    ({"a": (memoryview(b"1"),)}, "result['a'][0]", "memoryview"),
):
    for pickler in (auto, always):
        error = error_of(pickler.serialize, message)
        assert type(error) is TypeError, error
        expected = f"{path} (of type {kind}) cannot be sent to another worker: cannot pickle '{kind}' object"
        assert str(error) == expected, error
"""
    )


def test_tensors_that_are_not_sent_are_named_with_a_remedy(run_pickler: RunPython) -> None:
    run_pickler(
        """
from torch._subclasses.fake_tensor import FakeTensorMode
import warnings
warnings.simplefilter("ignore")
eye = torch.eye(4)
everywhere = {
    "meta": (torch.ones(2, device="meta"), 'on device "meta"', "torch.empty_like"),
    "csc": (eye.to_sparse_csc(), "SparseCsc", "to_sparse()"),
    "bsr": (eye.to_sparse_bsr((2, 2)), "SparseBsr", "to_sparse()"),
    "bsc": (eye.to_sparse_bsc((2, 2)), "SparseBsc", "to_sparse()"),
    "nested": (torch.nested.nested_tensor([eye, eye[:2]]), "nested", "unbind()"),
}
if torch.backends.mkldnn.is_available():
    everywhere["mkldnn"] = (eye.to_mkldnn(), "mkldnn", "to_dense()")
for name, (tensor, what, remedy) in everywhere.items():
    for message, path in ((call(max, [1, tensor]), "args[0][1]"), ((tensor,), "result[0]")):
        for pickler in (auto, always):
            error = error_of(pickler.serialize, message)
            text = str(error)
            assert type(error) is TypeError, (name, error)
            assert text.startswith(f"{path} (of type torch.Tensor) cannot be sent to another worker: "), (name, text)
            assert what.lower() in text.lower() and remedy in text, (name, text)
            assert name == "meta" or ".cpu()" not in text, text
fake = FakeTensorMode().from_tensor(eye)
for message, path in ((call(max, [1, fake]), "args[0][1]"), ((fake,), "result[0]")):
    error = error_of(auto.serialize, message)
    text = f"{path} (of type torch._subclasses.fake_tensor.FakeTensor) cannot be sent to another worker: "
    assert type(error) is TypeError and str(error).startswith(text + "it has no memory"), error
csr = eye.to_sparse_csr()
assert auto.serialize(call(max, csr))[1][0] is csr
assert "x.crow_indices()" in str(error_of(auto.serialize, csr))
no_tables()
"""
    )


def test_storages_travel_beside_the_pickle(run_pickler: RunPython) -> None:
    run_pickler(
        """
x = torch.arange(6.0)
untyped = x.untyped_storage()
typed = torch.storage.TypedStorage(wrap_storage=untyped, dtype=x.dtype, _internal=True)
empty = torch.UntypedStorage(0)
for pickler in (auto, always):
    data, tensors = pickler.serialize(call(max, x, untyped, [typed, typed], empty))
    assert [t.data_ptr() for t in tensors] == [x.data_ptr(), x.data_ptr(), 0], tensors  # no copies
    assert len(data) < 2000
    got, got_untyped, (got_typed, same), got_empty = received((data, tensors)).args
    assert same is got_typed and type(got_typed) is type(typed) and got_typed.dtype is x.dtype
    assert type(got_untyped) is torch.UntypedStorage and got_untyped.nbytes() == 24 and got_empty.nbytes() == 0
    assert bytes(got_untyped) == bytes(untyped) and got_typed.tolist() == x.tolist()
import warnings
warnings.simplefilter("ignore")
assert "meta" in str(error_of(auto.serialize, call(max, torch.UntypedStorage(4, device="meta"))))
# Under the modes of the caller, which must not see how a storage is pickled.
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    data, tensors = auto.serialize([untyped])
assert type(tensors[0]) is torch.Tensor
no_tables()
"""
    )


def test_exceptions_arrive_even_where_their_type_does_not(run_pickler: RunPython) -> None:
    run_pickler(
        """
from torch_rpc_mpi import _remote_errors
class Local(Exception):
    pass
class Silent(Exception):
    def __init__(self, code):
        super().__init__()
class Greedy(Exception):
    def __init__(self, code, text):
        super().__init__(code, text)
class Unpicklable(Exception, metaclass=type("Meta", (type,), {"__reduce__": None})):
    pass
module = types.ModuleType("passing")
sys.modules["passing"] = module
exec("class Gone(Exception): pass", module.__dict__)
texts = ("plain", "C:\\\\x", "\\\\N{", "\\\\u12", "Grüße 你好", "two\\nlines\\\\", "\\ud800", "x" * 100_000)
for text in texts:
    for kind, expected in (
        (ValueError, ValueError), (KeyError, KeyError), (Local, Local), (Silent, RuntimeError),
        (module.Gone, RuntimeError),
    ):
        messages = [pickler.serialize(_remote_errors.of_type(kind, text)) for pickler in (auto, always)]
        if kind is module.Gone:
            del sys.modules["passing"]
        for message in messages:
            error = error_of(internal._handle_exception, received(message))
            assert type(error) is expected and error.args == (text,), (error, text[:20])
        sys.modules["passing"] = module
error = error_of(internal._handle_exception, received(auto.serialize(_remote_errors.of_type(Greedy, "told"))))
assert type(error) is RuntimeError and "Failed to create original exception type" in str(error) and "told" in str(error)
no_tables()
"""
    )


def test_tables_of_threads_are_their_own(run_pickler: RunPython) -> None:
    run_pickler(
        """
def body(index, errors):
    try:
        for i in range(50):
            x = torch.full((4,), float(index * 100 + i))
            message = auto.serialize(call(lambda y: (x, y), x + 1))
            assert len(message[1]) == 2
            assert run(message)[0] is x
            error_of(auto.serialize, call(max, x, threading.Lock()))
        no_tables()
    except BaseException as error:
        errors.append(error)
errors = []
threads = [threading.Thread(target=body, args=(index, errors)) for index in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
"""
    )
