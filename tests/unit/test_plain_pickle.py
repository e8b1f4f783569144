"""csrc/python/pickle/plain_pickle.h against Python: what it writes and reads, and what it leaves to Python's pickle."""

from __future__ import annotations

import functools

import pytest
from unit_fakes import RunPython

PREAMBLE = """
import copyreg, math, operator, pathlib, pickle, pickletools, sys, types
import torch
import torch.distributed.rpc as rpc
from torch.distributed.rpc import internal
import unit_fakes
extension = unit_fakes.install_extension(pathlib.Path.cwd())
from torch_rpc_mpi._pickler import RpcPickler

pickler = RpcPickler()
plain = pickler.plain

def call(function, *args, **kwargs):
    return internal.PythonUDF(function, args, kwargs)

def received(pickled):
    data, tensors, rrefs = pickled
    assert rrefs == []
    pickletools.dis(data, out=open("/dev/null", "w"))  # raises for what is not in order
    theirs = internal.deserialize(data, tensors)
    (ours,) = plain.load_call(data, tensors)
    same(ours, theirs)
    if not isinstance(theirs, internal.PythonUDF):
        same(*plain.load_result(data, tensors), theirs)
    return ours

def same(x, y):
    assert type(x) is type(y), (x, y)
    if isinstance(x, (list, tuple)):
        assert len(x) == len(y)
        for pair in zip(x, y):
            same(*pair)
    elif isinstance(x, dict):
        same(list(x.items()), list(y.items()))
    elif isinstance(x, (torch.Tensor, types.FunctionType, type)):
        assert x is y
    elif isinstance(x, float):
        assert (math.copysign(1, x), x) == (math.copysign(1, y), y) or (x != x and y != y)
    else:
        assert x == y

def plus(x, y=0):
    return x + y

class Point:
    def method(self):
        pass
    class Inner:
        pass
"""


@pytest.fixture
def run_plain(run_forked_with_fakes: RunPython) -> RunPython:
    return functools.partial(run_forked_with_fakes, PREAMBLE)


def test_plain_values_arrive_as_they_are(run_plain: RunPython) -> None:
    run_plain(
        """
edges = [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1]
texts = ["", "a", "\\u00e4\\u4e2d\\U0001f600", "\\0", "x" * 63, "x" * 255, "x" * 256, "x" * 60000, "\\u00e4" * 128]
values = [None, True, False, *edges, *(-each for each in edges), -2**63, *texts, *(each.encode() for each in texts)]
values += [0.0, -0.0, 0.1, math.inf, -math.inf, math.nan, 5e-324, sys.float_info.max]
values += [(), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [None], [[]], [()], list(range(3000))]
values += [{"a": 1, 2: [3], (4, "5"): {None: 6.0}, b"7": ()}, {n: str(n) for n in range(3000)}]
deep = []
for _ in range(90):
    deep = [deep]
values += [deep, torch.ones(2), torch.ones(1, requires_grad=True).sum(), [torch.zeros(n) for n in range(700)]]
for value in values:
    same(received(plain.dump_result(value)), value)
    same(received(plain.dump_result([value])), [value])
    udf = call(plus, value)
    got = received(plain.dump_call(udf))
    assert type(got) is internal.PythonUDF and got.func is plus
    same(got.args, (value,))
    same(got.kwargs, {})
    got = received(plain.dump_call(call(plus, 1, **{"y": 2})))
    same((got.args, got.kwargs), ((1,), {"y": 2}))
"""
    )


def test_functions_and_classes_go_by_name_in_calls_only(run_plain: RunPython) -> None:
    run_plain(
        """
for function in (plus, Point, torch.nn.Linear, pickle.Pickler, RpcPickler, types.SimpleNamespace, int, dict):
    got = received(plain.dump_call(call(function, [function], k=function)))
    assert got.func is got.args[0][0] is got.kwargs["k"] is function
    assert plain.dump_result(function) is plain.dump_result([function]) is None
"""
    )


def test_what_is_not_plain_is_left_to_python(run_plain: RunPython) -> None:
    run_plain(
        """
class Text(str): pass
class Number(int): pass
class Sequence(list): pass
class Odd(type): pass
class OddClass(metaclass=Odd): pass
renamed = types.FunctionType(plus.__code__, globals(), "renamed")
shadowed = plus
def plus(x, y=0): pass
homeless = types.FunctionType(plus.__code__, {"__name__": None}, "plus")
far = types.FunctionType(plus.__code__, {"__name__": "no.such.module"}, "plus")

class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise AssertionError("user's code was run")
sys.modules["lazy"] = Lazy("lazy")
lazy = types.FunctionType(plus.__code__, {"__name__": "lazy"}, "plus")

deep = []
for _ in range(200):
    deep = [deep]
cycle = []
cycle.append(cycle)
x = torch.ones(2)
big = "x" * 100
twice, pair = [], (1, 2)
values = [Text("a"), Number(1), Sequence(), {1}, frozenset(), bytearray(b"a"), 1j, ..., object(), range(3)]
values += [torch.nn.Parameter(x), torch.float32, torch.Size([1]), Point(), internal.PythonUDF(1, 2, 3), operator.add]
values += [2**63, -2**63 - 1]
values += ["\\ud800", "x" * 2**17, b"x" * 2**17, deep, cycle, [x, x], [twice, twice], [pair, pair], [big, big]]
values += [lambda: 1, Point.method, Point().method, Point.Inner, OddClass, renamed, shadowed, homeless, far, lazy, len]
values += [type(None), type(Ellipsis)]
dotted = types.FunctionType(plus.__code__, globals(), "dotted")
dotted.__qualname__ = "outer.dotted"
globals()["outer.dotted"] = dotted
values.append(dotted)
for value in values:
    for pickled in (plain.dump_result(value), plain.dump_result((1, [value])), plain.dump_call(call(plus, value))):
        assert pickled is None, value
    assert plain.dump_call(call(plus, k=[value])) is None, value
for other in (None, (plus, (), {}), torch.nn.Module()):
    assert plain.dump_call(other) is None
"""
    )


def test_what_occurs_twice_stays_one_object(run_plain: RunPython) -> None:
    run_plain(
        """
x, items = torch.ones(2), [1]
data, tensors = pickler.serialize(call(plus, x, [items, items, x]))
got = internal.deserialize(data, tensors)
assert got.args[0] is got.args[1][2] and got.args[1][0] is got.args[1][1]
small, label = 7, "label"
same(received(plain.dump_result([small, small, label, label, (), ()])), [7, 7, "label", "label", (), ()])
"""
    )


def test_reducers_of_others_for_plain_types_are_used(run_plain: RunPython) -> None:
    run_plain(
        """
x = torch.ones(2)
def reduce(tensor):
    return Point, ()
for register in (
    lambda: pickler._register_reducer(torch.Tensor, reduce),
    lambda: internal._internal_rpc_pickler._register_reducer(torch.Tensor, reduce),
):
    pickler = RpcPickler()
    plain = pickler.plain
    assert plain.dump_result([x]) is not None
    register()
    assert plain.dump_result([x]) is plain.dump_call(call(plus, x)) is None
    assert plain.dump_result([1]) is not None
    assert type(internal.deserialize(*pickler.serialize([x]))[0]) is Point
    internal._internal_rpc_pickler._class_reducer_dict.clear()
"""
    )


def test_nothing_is_leaked(run_plain: RunPython) -> None:
    run_plain(
        """
x, items, text = torch.ones(2), [object], "x" * 100
def count():
    return [sys.getrefcount(each) for each in (x, items, text, plus, sys.modules, None)][:-1]
before = count()
for _ in range(100):
    plain.dump_call(call(plus, x, text))
    plain.dump_call(call(plus, items, 1j))
    plain.dump_result([x, items])
    data, tensors, _ = plain.dump_call(call(plus, x, (text, [x.sum()], {"k": 1.5})))
    plain.load_call(data, tensors)
    plain.load_call(data[:-1], tensors)
    plain.load_call(data[: len(data) // 2], tensors)
    del data, tensors
assert count() == before, (count(), before)
"""
    )


def test_what_is_not_in_order_is_not_read(run_plain: RunPython) -> None:
    run_plain(
        """
import random
x = torch.ones(2)
value = [1, 300, 2**40, 0.5, "text", "y" * 300, b"z", b"z" * 300, (1,), (1, 2), (1, 2, 3, x), {"k": [None]}, x.sum()]
data, tensors, _ = plain.dump_call(call(plus, value, True, key=False))
assert plain.load_call(data, tensors)
for length in range(len(data)):
    assert plain.load_call(data[:length], tensors) == ()
assert plain.load_call(data + b".", tensors) == plain.load_call(data, tensors[:1]) == plain.load_call(data, []) == ()
assert plain.load_result(data, tensors) == ()  # a call is no result

generator = random.Random(1)
opcodes = b"N\\x88\\x89KMJ\\x8aG\\x8cXCB)\\x85\\x86\\x87t]e}u(\\x93hR\\x81."
for _ in range(30_000):
    garbled = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(2, len(garbled))
        kind = generator.randrange(3)
        if kind == 0:
            garbled[place] = generator.choice(opcodes)
        elif kind == 1:
            garbled[place] = generator.randrange(256)
        else:
            del garbled[place : place + generator.randint(1, 8)]
    plain.load_call(bytes(garbled), tensors)  # no crash; what it reads may be other numbers and texts
receive = b"\\x8c\\x16torch_rpc_mpi._pickler\\x8c\\x0f_receive_tensor\\x93\\x94"
tokens = [bytes([opcode]) for opcode in opcodes] + [receive, receive, b"K\\0", b"K\\0\\x85R", b"h\\0", b"(", b"t"]
read = 0
for _ in range(100_000):
    garbled = b"\\x80\\x04" + b"".join(generator.choices(tokens, k=generator.randint(1, 8))) + b"."
    if ours := plain.load_result(garbled, tensors):
        same(*ours, internal.deserialize(garbled, tensors))  # raises where Python does not read it
        read += 1
assert read > 100
for garbled in (b"h\\0K\\0\\x85R.", b"(" + receive + b"(K\\0\\x85Rtt."):
    assert plain.load_result(b"\\x80\\x04" + garbled, tensors) == ()
"""
    )


def test_names_that_are_not_there_are_left_to_python(run_plain: RunPython) -> None:
    run_plain(
        """
data, tensors, _ = plain.dump_call(call(plus, 1))
kept = plus
del plus
assert plain.load_call(data, tensors) == ()
plus = kept
assert plain.load_call(data, tensors)[0].func is plus
data = data.replace(b"\\x8c\\x08__main__", b"\\x8c\\x08unloaded")
assert plain.load_call(data, tensors) == ()
"""
    )


def test_what_pythons_pickler_writes_is_left_to_it(run_plain: RunPython) -> None:
    run_plain(
        """
for value in (1, "text", [None], {"k": (1,)}, Point()):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        ours = plain.load_result(pickle.dumps(value, protocol), [])
        assert ours in ((), (value,)), (value, protocol)
"""
    )


def test_what_is_long_is_left_to_python(run_plain: RunPython) -> None:
    run_plain(
        """
labels = ["x" * 60]
assert plain.dump_result(labels * 100) is not None
assert plain.dump_result(labels * 10_000) is plain.dump_result([*range(100_000)]) is None
assert plain.dump_result({n: None for n in range(100_000)}) is plain.dump_result((0.5,) * 100_000) is None
"""
    )


def test_a_call_that_may_be_sent_again_is_read(run_plain: RunPython) -> None:
    run_plain(
        """
data, tensors = pickler.serialize(call(plus, 1, torch.ones(2)))
assert data.endswith(extension.RESENDABLE)
assert plain.load_call(data, tensors)[0].func is plus
assert plain.load_call(data + b" ", tensors) == plain.load_call(data[:-1], tensors) == ()
"""
    )


def test_a_module_that_another_thread_imports_is_left_to_python(run_plain: RunPython) -> None:
    run_plain(
        """
import threading
pathlib.Path("slow.py").write_text('''
import unit_fakes
def function():
    return helper()
unit_fakes.reached.set()
assert unit_fakes.go.wait(60)
def helper():
    return 1
''')
sys.path.insert(0, ".")
unit_fakes.reached, unit_fakes.go = threading.Event(), threading.Event()
importer = threading.Thread(target=lambda: __import__("slow"))
importer.start()
assert unit_fakes.reached.wait(60)
data, tensors, _ = plain.dump_call(call(plus))
data = data.replace(b"\\x8c\\x08__main__\\x8c\\x04plus", b"\\x8c\\x04slow\\x8c\\x08function")
assert plain.load_call(data, tensors) == ()
unit_fakes.go.set()
importer.join()
assert plain.load_call(data, tensors)[0].func() == 1
"""
    )
