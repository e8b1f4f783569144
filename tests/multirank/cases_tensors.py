"""Tensors: every dtype, layout and size keeps its meaning, as argument and as result, and nothing but it travels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from harness import World, case, equal, in_threads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

EAGER_LIMIT = 16384  # the default of the option eager_limit: larger tensors take another way
MIB = 2**20


def _storable(dtype: torch.dtype) -> bool:
    """Leaves out the quantized dtypes, which need a quantizer, and the bit fields, which have no operators at all."""
    try:
        with warnings.catch_warnings():  # some dtypes are announced as experimental
            warnings.simplefilter("ignore")
            torch.empty(2, dtype=dtype).clone()
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return not str(dtype).startswith(("torch.q", "torch.bits"))


DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype) and _storable(d)}, key=str)


def echo(value: Any) -> Any:
    return value


@torch.jit.script
def script_echo(x: Tensor) -> Tensor:
    return x


def describe(x: Tensor) -> dict[str, Any]:
    """What the callee sees of a strided tensor."""
    return {
        "dtype": x.dtype,
        "shape": tuple(x.shape),
        "stride": x.stride(),
        "conj": x.is_conj(),
        "neg": x.is_neg(),
        "requires_grad": x.requires_grad,
        "storage": x.untyped_storage().nbytes(),
        "sum": x.detach().to(torch.complex128).sum().item() if x.numel() else 0,
    }


def raw(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as not every dtype can be compared."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())[: x.numel() * x.element_size()]


def of_bytes(dtype: torch.dtype, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.empty(count, dtype=dtype)
    high = 2 if dtype == torch.bool else 256
    raw(x).copy_(torch.randint(high, (raw(x).numel(),), generator=generator, dtype=torch.uint8))
    return x


def both_ways(world: World, x: Any) -> Any:
    """To the next worker and back."""
    return rpc.rpc_sync(world.next, echo, args=(x,))


# Dtypes


@case(each=DTYPES)
def dtype(world: World, dtype: torch.dtype) -> None:
    for count in (3, 40_000):
        x = of_bytes(dtype, count)
        for function in (echo, script_echo):
            y = rpc.rpc_sync(world.next, function, args=(x,))
            assert y.dtype == dtype
            assert y.shape == x.shape
            equal(raw(y), raw(x))


@case()
def special_floating_point_values(world: World) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.7e308], dtype=torch.float64)
    equal(raw(both_ways(world, x)), raw(x))


QUANTIZED = {
    "per_tensor": lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.qint8),
    "per_tensor_quint8": lambda x: torch.quantize_per_tensor(x, 0.5, 100, torch.quint8),
    "per_tensor_qint32": lambda x: torch.quantize_per_tensor(x, 0.01, 0, torch.qint32),
    "per_channel": lambda x: torch.quantize_per_channel(
        x, torch.tensor([0.1, 0.2]), torch.tensor([0, 5]), 0, torch.qint8
    ),
}


@case(each=QUANTIZED)
def quantized(world: World, quantize: Any) -> None:
    for columns in (5, 30_000):
        x = quantize(torch.linspace(-3, 3, 2 * columns).reshape(2, columns))
        y = both_ways(world, x)
        assert y.is_quantized
        equal((y.dtype, y.qscheme(), y.shape), (x.dtype, x.qscheme(), x.shape))
        equal(y.int_repr(), x.int_repr())
        equal(y.dequantize(), x.dequantize())


# Shapes, strides, views

LAYOUTS = {
    "zero_dim": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0),
    "empty_of_many_dims": lambda: torch.empty(3, 0, 5),
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "transposed_large": lambda: torch.arange(60_000.0).reshape(200, 300).t(),
    "permuted": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "every_other": lambda: torch.arange(20.0)[::2],
    "every_other_large": lambda: torch.arange(100_000.0)[::2],
    "with_gaps": lambda: torch.arange(100.0).reshape(10, 10)[2:5, 3:7],
    "with_gaps_large": lambda: torch.arange(250_000.0).reshape(500, 500)[100:400, 50:450],
    "expanded": lambda: torch.arange(3.0).reshape(3, 1).expand(3, 5),
    "expanded_large": lambda: torch.arange(300.0).reshape(300, 1).expand(300, 500),
    "expanded_scalar": lambda: torch.tensor(7.0).expand(4),
    "overlapping": lambda: torch.arange(10.0).unfold(0, 4, 1),
    "offset": lambda: torch.arange(20.0)[5:],
    "channels_last": lambda: torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "many_dims": lambda: torch.arange(64.0).reshape([2] * 6),
    "conjugated": lambda: torch.arange(6).to(torch.complex64).mul(1j).conj(),
    "conjugated_large": lambda: torch.arange(20_000).to(torch.complex64).mul(1j).conj(),
    "negated": lambda: torch.arange(6).to(torch.complex64).mul(1j).conj().imag,
    "negated_large": lambda: torch.arange(20_000).to(torch.complex64).mul(1j).conj().imag,
    "real_part": lambda: torch.arange(6).to(torch.complex64).real,
}


@case(each=LAYOUTS, sizes=(1, 4))
def layout(world: World, make: Any) -> None:
    x = make()
    y = both_ways(world, x)
    equal((y.dtype, y.shape, y.resolve_conj().resolve_neg()), (x.dtype, x.shape, x.resolve_conj().resolve_neg()))
    seen = rpc.rpc_sync(world.next, describe, args=(x,))
    equal((seen["dtype"], seen["shape"], seen["sum"]), (x.dtype, tuple(x.shape), x.to(torch.complex128).sum().item()))
    equal(rpc.rpc_sync(world.next, script_echo, args=(x,)).resolve_conj().resolve_neg(), x.resolve_conj().resolve_neg())
    equal(rpc.rpc_sync(world.next, torch.clone, args=(x,)).resolve_conj().resolve_neg(), x.resolve_conj().resolve_neg())


@case()
def a_view_sends_only_what_it_shows(world: World) -> None:
    base = torch.arange(4.0 * MIB)
    for view in (base[10:20], base[:: len(base) // 8], base[: 2 * EAGER_LIMIT], base.reshape(2048, 2048)[5]):
        seen = rpc.rpc_sync(world.next, describe, args=(view,))
        equal(seen["sum"].real, view.double().sum().item())
        shown = view.numel() * view.element_size()
        assert seen["storage"] <= 2 * shown + 4096, f"{seen['storage']} bytes of storage for {shown} bytes"
        back = both_ways(world, view)
        equal(back, view)
        assert back.untyped_storage().nbytes() <= 2 * shown + 4096


@case()
def tensors_that_share_a_storage(world: World) -> None:
    for count in (10, 40_000):
        base = torch.arange(float(count))
        parts = [base, base[: count // 2], base[count // 2 :], base, base.reshape(2, -1)]
        for got, sent in zip(both_ways(world, parts), parts, strict=True):
            equal(got, sent)


# Where each view begins in the storage, in bytes, and its dtype. What they share begins between elements of some.
MIXED_DTYPES = {
    "bytes_and_float64": [(3, torch.uint8), (8, torch.float64)],
    "float64_and_bytes": [(24, torch.float64), (5, torch.uint8)],
    "bytes_and_int16": [(1, torch.uint8), (2, torch.int16)],
    "bytes_and_complex64": [(7, torch.uint8), (8, torch.complex64)],
    "int16_and_float64": [(6, torch.int16), (8, torch.float64)],
    "complex64_and_int16": [(16, torch.complex64), (10, torch.int16)],
    "complex64_and_complex128": [(8, torch.complex64), (16, torch.complex128)],
    "all_at_once": [
        (9, torch.uint8),
        (16, torch.float64),
        (10, torch.int16),
        (24, torch.complex64),
        (12, torch.float32),
        (11, torch.int8),
    ],
}
STORAGES = {"eager": 80, "bulk": 4 * EAGER_LIMIT, "chunks": 5 * MIB}  # bytes


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the callee sees in views, apart from how it sends views back."""
    return [x.clone() for x in tensors]


@case(
    each={f"{views}-{size}": (MIXED_DTYPES[views], STORAGES[size]) for views in MIXED_DTYPES for size in STORAGES},
    sizes=(1, 2),
    tensorpipe="its descriptions of tensors mix up dtypes of one storage",
)
def views_of_several_dtypes_share_a_storage(world: World, variant: Any) -> None:
    views, size = variant
    base = (torch.arange(size) % 61).to(torch.uint8)  # small bytes make finite numbers, which can be compared
    x = [base[begin : size - 8 * index].view(torch.uint8) for index, (begin, _) in enumerate(views)]
    x = [part[: len(part) // 16 * 16].view(dtype) for part, (_, dtype) in zip(x, views, strict=True)]
    expected = copies(x)
    for to in (world.next, world.name()):
        equal(rpc.rpc_sync(to, copies, args=(x,)), expected)
        equal(rpc.rpc_sync(to, echo, args=(x,)), expected)
        equal(rpc.remote(to, echo, args=(tuple(x),)).to_here(), tuple(expected))


@case()
def memory_that_torch_does_not_own(world: World) -> None:
    for count in (10, 40_000):
        buffer = bytearray(4 * count)
        x = torch.frombuffer(buffer, dtype=torch.int32)
        x += torch.arange(count, dtype=torch.int32)
        equal(both_ways(world, x), x)


@case()
def results_are_the_callers_own(world: World) -> None:
    """What arrives can be changed and kept without an effect on anything else."""
    for count in (10, 40_000):
        first = both_ways(world, torch.ones(count))
        second = both_ways(world, torch.ones(count))
        first.zero_()
        equal(second, torch.ones(count))
        equal(both_ways(world, second), torch.ones(count))


# Gradients


@case()
def requires_grad(world: World) -> None:
    leaf = torch.ones(3, requires_grad=True)
    for x in (leaf, leaf * 2, leaf.detach(), torch.nn.Parameter(torch.ones(2))):
        seen = rpc.rpc_sync(world.next, describe, args=(x,))
        equal(seen["requires_grad"], x.requires_grad)
        y = both_ways(world, x)
        equal((y.requires_grad, y.is_leaf), (x.requires_grad, True))
        equal(y.detach(), x.detach())


# Sparse

SPARSE = {
    "coo": lambda n: torch.eye(n).to_sparse(),
    "coo_uncoalesced": lambda n: torch.sparse_coo_tensor([[0, 0, n - 1], [1, 1, 0]], [1.0, 2.0, 3.0], (n, n)),
    "coo_hybrid": lambda n: torch.sparse_coo_tensor([[0, n - 1]], torch.ones(2, 4), (n, 4)),
    "coo_empty": lambda n: torch.sparse_coo_tensor(size=(n, n)),
    "csr": lambda n: torch.eye(n).to_sparse_csr(),
    "csc": lambda n: torch.eye(n).to_sparse_csc(),
    "bsr": lambda n: torch.eye(n).to_sparse_bsr((2, 2)),
    "bsc": lambda n: torch.eye(n).to_sparse_bsc((2, 2)),
}


def parts(x: Tensor) -> list[Tensor]:
    """The tensors that a sparse one consists of."""
    if x.layout == torch.sparse_coo:
        return [x._indices(), x._values()]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    return [x.ccol_indices(), x.row_indices(), x.values()]


def check_sparse(world: World, x: Tensor) -> None:
    seen = rpc.rpc_sync(world.next, parts, args=(x,))
    equal(seen, parts(x))
    for y in (both_ways(world, x), both_ways(world, [x])[0], rpc.rpc_sync(world.next, script_echo, args=(x,))):
        equal((y.layout, y.shape, y.dtype), (x.layout, x.shape, x.dtype))
        equal(parts(y), parts(x))


@case(each={name: make for name, make in SPARSE.items() if name.startswith("coo")})
def sparse_coo(world: World, make: Any) -> None:
    for n in (4, 6000):
        check_sparse(world, make(n))


# As results torch itself refuses them, before a backend sees them: Message::getStorages() knows no compressed layout.
@case()
def sparse_csr_as_argument(world: World) -> None:
    for n in (4, 6000):
        x = SPARSE["csr"](n)
        equal(rpc.rpc_sync(world.next, parts, args=(x,)), parts(x))


@torch.jit.script
def with_compressed_part(x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    return {"parts": [x, x.to_sparse_csr()]}


@torch.jit.script
def in_blocks(x: torch.Tensor) -> torch.Tensor:
    return x.to_sparse_bsr([2, 2])


@case(sizes=(2,))
def what_a_script_returns_and_cannot_be_sent_is_named(world: World) -> None:
    calls = {
        "rpc_sync": lambda function: rpc.rpc_sync(world.next, function, args=(torch.eye(4),)),
        "to_here": lambda function: rpc.remote(world.next, function, args=(torch.eye(4),)).to_here(),
    }
    for how, call in calls.items():
        for function, path, remedy in (
            (with_compressed_part, "result['parts'][1] (of type torch.Tensor)", "x.crow_indices()"),
            (in_blocks, "result (of type torch.Tensor)", "x.to_sparse()"),
        ):
            with pytest.raises(RuntimeError) as caught:
                call(function)
            text = str(caught.value)
            for part in (path, remedy, world.next):
                assert part in text, f"{how}: {text}"
            assert "frame #" not in text, f"{how}: {text}"


# Sizes and numbers


@case(
    each=(0, 1, 100, EAGER_LIMIT - 1, EAGER_LIMIT, EAGER_LIMIT + 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 16 * MIB),
    sizes=(1, 2, 4),
)
def bytes_in_one_tensor(world: World, count: int) -> None:
    x = of_bytes(torch.uint8, count)
    equal(both_ways(world, x), x)
    equal(rpc.rpc_sync(world.next, torch.bitwise_not, args=(x,)), ~x)


@case(each=(EAGER_LIMIT, 4 * MIB))
def bytes_in_the_pickle(world: World, count: int) -> None:
    """Payload that is no tensor."""
    for size in (count - 1, count, count + 1, 3 * count):
        value = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        equal(both_ways(world, value), value)


@case(each=(1000, 5000))
def many_tensors_in_one_message(world: World, count: int) -> None:
    tensors = [torch.full((i % 7,), float(i)) for i in range(count)]
    equal(both_ways(world, tensors), tensors)


@case()
def large_and_small_tensors_in_one_message(world: World) -> None:
    sizes = [0, 1, EAGER_LIMIT, 5, EAGER_LIMIT + 1, 0, MIB, 3, 4 * MIB, EAGER_LIMIT - 1] * 2
    tensors = [of_bytes(torch.uint8, size) for size in sizes]
    equal(both_ways(world, {"tensors": tensors, "text": "x" * 100_000})["tensors"], tensors)


@case()
def many_large_calls_at_once(world: World) -> None:
    """Everyone sends to everyone, more than can be in flight."""
    tensors = [torch.full((MIB // 4,), float(i)) for i in range(24)]
    futures = [rpc.rpc_async(world.name(world.rank + i), echo, args=(x,)) for i, x in enumerate(tensors)]
    for future, x in zip(futures, tensors, strict=True):
        equal(future.wait(), x)


@case()
def all_sizes_from_many_threads(world: World) -> None:
    def calls(thread: int) -> None:
        for index, size in enumerate((1, 100, EAGER_LIMIT, EAGER_LIMIT + 1, 200_000, MIB)):
            x = torch.full((size // 4 + 1,), float(100 * thread + index))
            equal(rpc.rpc_sync(world.name(thread + index), echo, args=(x,)), x)

    in_threads(6, calls)


# A message past 2**31 bytes: MPI counts are ints where there are no large-count calls


@case(large=True, sizes=(2,), limit=300, options={"rpc_timeout": 280})
def more_than_2_gib_in_one_tensor(world: World) -> None:
    if world.rank == 0:
        count = 2**31 + 4099
        x = torch.zeros(count, dtype=torch.uint8)
        marks = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, count - 1])
        x[marks] = torch.arange(1, 7, dtype=torch.uint8)
        y = rpc.rpc_sync(world.next, echo, args=(x,))
        equal((y.numel(), y[marks]), (count, x[marks]))
        equal(int(y.count_nonzero()), 6)


def plain() -> torch.Tensor:
    return torch.ones(2)


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


class Tagged(torch.Tensor):
    """A subclass, which pickles in a way of its own."""


def tagged() -> torch.Tensor:
    return torch.ones(2).as_subclass(Tagged)


@case()
def types_of_results(world: World) -> None:
    """A tensor of another type than torch.Tensor stays what it is."""
    equal(type(rpc.rpc_sync(world.next, plain)), torch.Tensor)
    equal(type(rpc.rpc_sync(world.next, parameter)), torch.nn.Parameter)
    equal(type(rpc.rpc_sync(world.next, tagged)), Tagged)
    with dist_autograd.context():
        equal(type(rpc.rpc_sync(world.next, parameter)), torch.nn.Parameter)


# Tensors that are not sent, and storages


class NoMemory(torch.Tensor):
    """A wrapper of another tensor: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return "NoMemory()"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return NoMemory, (self.inner,)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError("not for operators")


def inner_of(x: NoMemory) -> Tensor:
    assert type(x) is NoMemory
    return x.inner


@torch.jit.script
def script_first(xs: list[Tensor], named: dict[str, tuple[int, Tensor]]) -> Tensor:
    return xs[0] + named["a"][1]


@case(sizes=(1, 2), tensorpipe="a process crashes")
def tensors_without_memory(world: World) -> None:
    """Subclasses without a storage, fake tensors and their kind are errors that name them, wherever they are met."""
    x, bad = torch.ones(3), NoMemory(torch.ones(3))
    originals = (torch.ones(3), torch.ones(0), torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr())
    fakes = [FakeTensorMode().from_tensor(original) for original in originals]
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    kind = r"\(of type cases_tensors.NoMemory\) cannot be sent to another worker: it has no memory"
    for to in dict.fromkeys((world.next, world.name())):
        for api in (rpc.rpc_sync, rpc.remote):
            for function, arguments, path in (
                (torch.neg, {"args": (bad,)}, r"args\[0\]"),
                (torch.add, {"args": (x,), "kwargs": {"other": bad}}, r"kwargs\['other'\]"),
                (torch.cat, {"args": ([x, bad],)}, r"args\[0\]\[1\]"),
                (script_echo, {"args": (bad,)}, r"args\[0\]"),
                (script_first, {"args": ([x], {"a": (1, bad)})}, r"args\[1\]\['a'\]\[1\]"),
            ):
                with pytest.raises(TypeError, match=f"^{path} {kind}"):
                    api(to, function, **arguments)
            for shape in fakes:
                with pytest.raises(TypeError, match=r"^args\[0\] \(of type torch._subclasses.fake_tensor.FakeTensor\)"):
                    api(to, torch.neg, args=(shape,))
            for function in (torch.neg, echo):
                with pytest.raises(TypeError, match=r"^args\[0\] \(of type torch.Tensor\).*no memory"):
                    api(to, function, args=(freed,))
                with pytest.raises(TypeError, match=r'^args\[0\] \(of type torch.Tensor\).*on device "meta"'):
                    api(to, function, args=(x.to("meta"),))
        equal(rpc.rpc_sync(to, inner_of, args=(bad,)), x)  # a function gets it as it pickles itself
        with pytest.raises(TypeError, match=r"result\[1\] .*FakeTensor|result\[1\].*meta"):
            rpc.rpc_sync(to, results_without_memory, args=("fake",))
        with pytest.raises(TypeError, match=r"result\[1\] .*no memory"):
            rpc.rpc_sync(to, results_without_memory, args=("freed",))
        with pytest.raises(RuntimeError, match='on device "meta"'):
            rpc.rpc_sync(to, torch.empty, args=([2],), kwargs={"device": "meta"})
        equal(rpc.rpc_sync(to, torch.neg, args=(x,)), -x)


def results_without_memory(kind: str) -> Any:
    if kind == "fake":
        return [1, torch.ones(3, device="meta")]
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    return [1, freed]


def change_storages(x: Tensor, untyped: torch.UntypedStorage, typed: Any) -> Any:
    typed[0] = 7.0
    for i in range(4):
        untyped[4 + i] = untyped[i]
    return x, untyped, typed


@case(sizes=(1, 2), tensorpipe="torch pickles storages by value")
def storages(world: World) -> None:
    """They arrive, and share with the tensors of their message what they shared before."""
    for count in (3, 40_000):
        x = torch.arange(float(count))
        typed = torch.storage.TypedStorage(wrap_storage=x.untyped_storage(), dtype=x.dtype, _internal=True)
        expected = x.clone()
        expected[:2] = 7.0
        for to in dict.fromkeys((world.next, world.name())):
            y, untyped, typed_back = rpc.rpc_sync(
                to, change_storages, args=(x[: count - 1], x.untyped_storage(), typed)
            )
            equal(x[0].item(), 0.0)
            equal(y, expected[: count - 1])
            equal(typed_back.tolist(), expected.tolist())
            equal(y.data_ptr(), untyped.data_ptr())
            equal(y.data_ptr(), typed_back._untyped_storage.data_ptr())
            equal((type(untyped), untyped.nbytes()), (torch.UntypedStorage, 4 * count))
        equal(both_ways(world, [x.untyped_storage()])[0].tolist()[:8], x.untyped_storage().tolist()[:8])
