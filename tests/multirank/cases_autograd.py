"""Distributed autograd, optimizers and modules: the same gradients and steps as in one process."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_calls import APIS, identity, script_scale_and_add
from harness import World, case, equal, eventually, in_threads
from torch import Tensor, optim
from torch.distributed.nn import RemoteModule
from torch.distributed.optim import DistributedOptimizer
from torch.distributed.rpc import RRef


def matmul_here(x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x, y)


@torch.jit.script
def script_matmul(x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x, y)


MATMUL = {"python": matmul_here, "builtin": torch.mm, "script": script_matmul}


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(3, 3, requires_grad=True, generator=generator) for _ in range(2))


def expect_gradients(context_id: int, inputs: tuple[Tensor, ...], loss: Tensor) -> None:
    """Runs the backward pass both ways, the local one on a loss that never left this process."""
    expected = torch.autograd.grad(loss, inputs)
    gradients = dist_autograd.get_gradients(context_id)
    equal(len(gradients), len(inputs))
    for x, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(gradients[x], gradient)


@case(
    each={f"{kind}-{api}": (MATMUL[kind], APIS[api]) for kind in MATMUL for api in APIS},
    sizes=(1, 2, 4),
)
def backward_through_a_call(world: World, variant: Any) -> None:
    function, api = variant
    x, y = pair(world.rank)
    with dist_autograd.context() as context_id:
        loss = api(world.next, function, args=(x, y)).sum()
        dist_autograd.backward(context_id, [loss])
        expect_gradients(context_id, (x, y), torch.mm(x, y).sum())


def relay(x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    if not names:
        return torch.mm(x, y)
    return rpc.rpc_sync(names[0], relay, args=(torch.sin(x), y, names[1:])) * 2


@case(sizes=(2, 4, 6))
def backward_through_nested_calls(world: World) -> None:
    x, y = pair()
    route = [world.name(world.rank + hop) for hop in range(1, 2 * world.size + 1)]
    with dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [relay(x, y, route).sum()])
        local = x
        for _ in route:
            local = torch.sin(local)
        expect_gradients(context_id, (x, y), (torch.mm(local, y) * 2 ** len(route)).sum())


@case()
def several_roots_and_workers(world: World) -> None:
    x, y = pair()
    with dist_autograd.context() as context_id:
        results = [rpc.rpc_async(to, torch.mm, args=(x, y)) for to in world.everyone]
        losses = [future.wait().sum() for future in results]
        dist_autograd.backward(context_id, losses)
        expect_gradients(context_id, (x, y), torch.mm(x, y).sum() * world.size)


@case()
def gradients_accumulate_and_graphs_are_retained(world: World) -> None:
    x, y = pair()
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync(world.next, torch.mm, args=(x, y)).sum()
        for times in range(1, 4):
            dist_autograd.backward(context_id, [loss], retain_graph=True)
            expect_gradients(context_id, (x, y), torch.mm(x, y).sum() * times)


@case()
def many_contexts_at_once(world: World) -> None:
    def train(thread: int) -> None:
        for step in range(10):
            x, y = pair(100 * world.rank + 10 * thread + step)
            with dist_autograd.context() as context_id:
                loss = rpc.rpc_sync(world.name(thread + step), matmul_here, args=(x, y)).sum()
                dist_autograd.backward(context_id, [loss])
                expect_gradients(context_id, (x, y), torch.mm(x, y).sum())

    in_threads(4, train)


@case()
def contexts_are_released_everywhere(world: World) -> None:
    x, y = pair()
    for _ in range(5):
        with dist_autograd.context() as context_id:
            loss = relay(x, y, world.others).sum()
            dist_autograd.backward(context_id, [loss])
    for key in ("num_current_backward_passes", "num_autograd_contexts"):
        eventually(lambda key=key: int(dist_autograd._get_debug_info()[key]) == 0, f"{key} is 0")
    with pytest.raises(RuntimeError, match=f"autograd context with id: {context_id}"):
        dist_autograd.get_gradients(context_id)


@case()
def large_tensors(world: World) -> None:
    x = torch.rand(700, 700, requires_grad=True)
    with dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [rpc.rpc_sync(world.next, torch.mul, args=(x, x)).sum()])
        expect_gradients(context_id, (x,), (x * x).sum())


class Embedder:
    """Makes sparse gradients."""

    def __init__(self) -> None:
        self.embedding = torch.nn.Embedding(20, 3, sparse=True)

    def forward(self, index: Tensor) -> Tensor:
        return self.embedding(index)

    def gradient(self, context_id: int) -> Tensor:
        return dist_autograd.get_gradients(context_id)[self.embedding.weight]


@case()
def sparse_gradients(world: World) -> None:
    embedder = rpc.remote(world.next, Embedder)
    index = torch.tensor([1, 5, 5])
    with dist_autograd.context() as context_id:
        loss = embedder.rpc_sync().forward(index).sum()
        dist_autograd.backward(context_id, [loss])
        gradient = embedder.rpc_sync().gradient(context_id)
        assert gradient.is_sparse
        expected = torch.zeros(20, 3)
        expected[1], expected[5] = 1, 2
        equal(gradient.to_dense(), expected)


# Errors


class Explode(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("exploded on purpose")


def explode(x: Tensor) -> Tensor:
    return Explode.apply(x)


@case()
def errors(world: World) -> None:
    x, y = pair()
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync(world.next, explode, args=(x,)).sum()
        with pytest.raises(RuntimeError, match="exploded on purpose"):
            dist_autograd.backward(context_id, [loss])
    with dist_autograd.context() as context_id:
        with pytest.raises(RuntimeError, match="requires_grad not set on"):
            dist_autograd.backward(context_id, [x.detach().sum()])
        with pytest.raises(RuntimeError, match="No tensors provided"):
            dist_autograd.backward(context_id, [])
    with pytest.raises(RuntimeError, match="Could not find autograd context with id: 12345"):
        dist_autograd.backward(12345, [torch.mm(x, y).sum()])
    backward_through_a_call(world, (matmul_here, APIS["sync"]))


# RRef.backward


def remote_sum(x: RRef, y: Tensor) -> Tensor:
    return (x.to_here() + y).sum()


@case()
def backward_of_rrefs(world: World) -> None:
    x, y = pair()
    with dist_autograd.context() as context_id:
        user = rpc.remote(world.next, remote_sum, args=(RRef(x), y))
        user.backward(context_id)
        expect_gradients(context_id, (x, y), (x + y).sum())
    with dist_autograd.context() as context_id:
        owner = RRef((x * y).sum())
        owner.backward(context_id)
        expect_gradients(context_id, (x, y), (x * y).sum())
    x, y = pair()
    RRef((x * y).sum()).backward()
    equal(x.grad, y.detach())
    with pytest.raises(RuntimeError, match="Could not find autograd context with id: 100"):
        RRef((x * y).sum()).backward(100)
    with dist_autograd.context() as context_id, pytest.raises(RuntimeError, match="RRef should contain a tensor"):
        RRef("text").backward(context_id)


# Optimizers


class Weights:
    """One parameter, the same wherever it is made."""

    def __init__(self, seed: int) -> None:
        self.w = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(self.w, x)

    def parameter(self) -> Tensor:
        return self.w


class PlainSGD(optim.SGD):
    """A class of the user's, which torch cannot turn into TorchScript."""


class FailingOptimizer(optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        raise ValueError("optimizer failed")


class UnmakeableOptimizer(FailingOptimizer):
    def __init__(self, parameters: Any) -> None:
        raise ValueError("optimizer not made")


OPTIMIZERS = {
    "SGD": (optim.SGD, {"lr": 0.05}),
    "SGD_nesterov": (optim.SGD, {"lr": 1e-3, "momentum": 1, "weight_decay": 1, "nesterov": True}),
    "Adagrad": (optim.Adagrad, {"lr": 0.05}),
    "Adam": (optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "AdamW": (optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "Adadelta": (optim.Adadelta, {"rho": 0.95}),
    "RMSprop": (optim.RMSprop, {"lr": 0.05}),
    "Adamax": (optim.Adamax, {"lr": 0.05}),
    "Rprop": (optim.Rprop, {"lr": 0.05}),
    "without_torchscript": (PlainSGD, {"lr": 0.05}),
}


def remote_weights(world: World) -> tuple[list[RRef], list[RRef]]:
    modules = [rpc.remote(world.name(world.rank + hop), Weights, args=(hop,)) for hop in (1, 2)]
    return modules, [module.remote().parameter() for module in modules]


@case(each=OPTIMIZERS)
def optimizer(world: World, variant: Any) -> None:
    kind, options = variant
    x = torch.rand(3, 3, generator=torch.Generator().manual_seed(9))
    local = [Weights(1), Weights(2)]
    local_optimizer = kind([weights.w for weights in local], **options)
    modules, parameters = remote_weights(world)
    remote_optimizer = DistributedOptimizer(kind, parameters, **options)
    equal(remote_optimizer.is_functional_optim, kind is not PlainSGD)
    for _ in range(3):
        local_optimizer.zero_grad()
        local[1].forward(local[0].forward(x)).sum().backward()
        local_optimizer.step()
        with dist_autograd.context() as context_id:
            output = modules[1].rpc_sync().forward(modules[0].rpc_sync().forward(x))
            dist_autograd.backward(context_id, [output.sum()])
            remote_optimizer.step(context_id)
    for parameter, weights in zip(parameters, local, strict=True):
        torch.testing.assert_close(parameter.to_here(), weights.w)


@case()
def optimizer_errors(world: World) -> None:
    logging.disable(logging.WARNING)  # torch warns about every optimizer that is not its own
    modules, parameters = remote_weights(world)
    with pytest.raises(ValueError, match="optimizer not made"):
        DistributedOptimizer(UnmakeableOptimizer, parameters)
    failing = DistributedOptimizer(FailingOptimizer, parameters)
    with dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [modules[0].rpc_sync().forward(torch.ones(3, 3)).sum()])
        with pytest.raises(ValueError, match="optimizer failed"):
            failing.step(context_id)
    with pytest.raises(RuntimeError, match="Could not find autograd context"):
        failing.step(12345)


# RemoteModule


class Net(torch.nn.Module):
    """Deterministic wherever it is made."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)
        self.scale = scale
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.linear(x) * self.scale + shift


def use_module(module: Any, x: Tensor) -> Tensor:
    return module.forward(x)


def make_net() -> Net:
    return Net(2.0)


@case(sizes=(1, 4))
def remote_module(world: World) -> None:
    x, local = torch.ones(3, 4), Net(2.0)
    module = RemoteModule(f"{world.next}/cpu", Net, args=(2.0,))
    torch.testing.assert_close(module(x), local(x))
    torch.testing.assert_close(module.forward_async(x, shift=1.0).wait(), local(x, shift=1.0))
    torch.testing.assert_close(module.get_module_rref().rpc_sync().forward(x), local(x))
    equal([p.to_here() for p in module.remote_parameters()], list(local.parameters()))
    equal(module.training, True)
    with pytest.raises(ValueError, match="not supported for RemoteModule"):
        module.cuda()


@case()
def remote_module_made_from_an_rref_and_sent_on(world: World) -> None:
    x, local = torch.ones(3, 4), Net(2.0)
    module = RemoteModule.init_from_module_rref(world.next, rpc.remote(world.next, make_net))
    # Not module(x): torch leaves the hooks out of modules made this way.
    torch.testing.assert_close(module.forward(x), local(x))
    torch.testing.assert_close(rpc.rpc_sync(world.name(world.rank + 2), use_module, args=(module, x)), local(x))


@case()
def remote_module_trains(world: World) -> None:
    x, local = torch.ones(3, 4), Net()
    module = RemoteModule(world.next, Net)
    parameters = module.remote_parameters()
    optimizer = DistributedOptimizer(optim.SGD, parameters, lr=0.1)
    local_optimizer = optim.SGD(local.parameters(), lr=0.1)
    for _ in range(3):
        local_optimizer.zero_grad()
        local(x).pow(2).mean().backward()
        local_optimizer.step()
        with dist_autograd.context() as context_id:
            dist_autograd.backward(context_id, [module(x).pow(2).mean()])
            optimizer.step(context_id)
    for remote, here in zip(parameters, local.parameters(), strict=True):
        torch.testing.assert_close(remote.to_here(), here.detach())


@case()
def calls_without_gradients_in_a_context(world: World) -> None:
    with dist_autograd.context():
        equal(rpc.rpc_sync(world.next, identity, args=({"no": "tensor"},)), {"no": "tensor"})
        equal(rpc.rpc_sync(world.next, script_scale_and_add, args=(torch.ones(2), 2.0)), torch.full((2,), 2.0))
