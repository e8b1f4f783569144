"""RRefs: values that live elsewhere, their proxies, and their copies."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_calls import identity, scale_and_add, script_scale_and_add
from harness import World, case, debug_info, equal, eventually, signal_and_wait
from torch import Tensor
from torch.distributed.rpc import RRef


class Account:
    """A remote object with state."""

    def __init__(self, balance: int = 0) -> None:
        self.balance = balance

    def deposit(self, amount: int, *, times: int = 1) -> int:
        self.balance += amount * times
        return self.balance

    def fail(self) -> None:
        raise ValueError("account is closed")


def fetch(rref: RRef) -> Any:
    return rref.to_here()


def forward_along(rref: RRef, names: list[str]) -> Any:
    """Passes a user's copy on to further users, and returns what the last of them sees."""
    if not names:
        return rref.to_here()
    return rpc.rpc_sync(names[0], forward_along, args=(rref, names[1:]))


def new_here(value: Any) -> RRef:
    return RRef(value)


def new_elsewhere(to: str, value: Any) -> RRef:
    return rpc.remote(to, identity, args=(value,))


def local_value(rref: RRef) -> Any:
    return rref.local_value()


def local_sum(rref: RRef) -> Tensor:
    return rref.local_value().sum()


def describe(rref: RRef) -> tuple[bool, bool, str, int]:
    return rref.is_owner(), rref.confirmed_by_owner(), rref.owner_name(), rref.owner().id


class RaisesAtTheCallee:
    """An argument that cannot be unpickled, which shows when ``go`` is there."""

    def __init__(self, started: Any, go: Any) -> None:
        self.events = started, go

    def __reduce__(self) -> Any:
        return wait_and_raise, self.events


def wait_and_raise(started: Any, go: Any) -> None:
    signal_and_wait(started, go)
    raise_value_error()


def raise_value_error() -> None:
    raise ValueError("not to be had")


@torch.jit.script
def script_to_here(rref: RRef[Tensor]) -> Tensor:
    return rref.to_here()


@torch.jit.script
def script_describe(rref: RRef[Tensor]) -> tuple[bool, bool, str]:
    return rref.is_owner(), rref.confirmed_by_owner(), rref.owner_name()


@torch.jit.script
def script_sum(rrefs: list[RRef[Tensor]]) -> Tensor:
    return rrefs[0].to_here().sum()


@torch.jit.script
def script_local_value(rref: RRef[Tensor]) -> Tensor:
    return rref.local_value()


@torch.jit.script
def script_pass_on(rref: RRef[Tensor]) -> RRef[Tensor]:
    return rref


CREATE = {
    "python": lambda to: rpc.remote(to, scale_and_add, args=(torch.ones(3), 2.0)),
    "builtin": lambda to: rpc.remote(to, torch.add, args=(torch.ones(3), 1)),
    "script": lambda to: rpc.remote(to, script_scale_and_add, args=(torch.ones(3), 2.0)),
}


@case(each=CREATE, sizes=(1, 2, 4, 6))
def to_here(world: World, create: Any) -> None:
    for to in world.everyone:
        rref = create(to)
        equal(rref.to_here(), torch.full((3,), 2.0))
        equal(rref.to_here(timeout=20), torch.full((3,), 2.0))
        equal((rref.owner_name(), rref.owner().name, rref.is_owner()), (to, to, to == world.name()))


@case()
def local_rref(world: World) -> None:
    rref = RRef(torch.arange(3))
    equal(rref.local_value(), torch.arange(3))
    equal(rref.to_here(), torch.arange(3))
    assert rref.is_owner()
    assert rref.confirmed_by_owner()


@case()
def local_value_only_at_the_owner(world: World) -> None:
    rref = rpc.remote(world.next, identity, args=(1,))
    with pytest.raises(RuntimeError, match=rf"rank.*{world.rank}|local_value.*non-owner|owner.*{world.next}"):
        rref.local_value()
    equal(rpc.rpc_sync(world.next, local_value, args=(rref,)), 1)


@case(sizes=(1, 4))
def proxies(world: World) -> None:
    account = rpc.remote(world.next, Account, args=(10,))
    equal(account.rpc_sync().deposit(1), 11)
    equal(account.rpc_async().deposit(2).wait(), 13)
    equal(account.remote().deposit(3, times=2).to_here(), 19)
    equal(account.rpc_sync(timeout=20).deposit(0), 19)
    # A proxy can be kept and used again.
    proxy = account.rpc_sync()
    equal([proxy.deposit(1) for _ in range(3)], [20, 21, 22])
    with pytest.raises(ValueError, match="account is closed"):
        account.rpc_sync().fail()
    with pytest.raises(AttributeError, match="withdraw"):
        account.rpc_sync().withdraw(1)
    with pytest.raises(AttributeError, match="withdraw"):
        account.rpc_async().withdraw(1).wait()
    with pytest.raises(AttributeError, match="withdraw"):
        account.remote().withdraw(1)


@case(each=CREATE)
def proxies_of_tensors(world: World, create: Any) -> None:
    rref = create(world.next)
    equal(rref.rpc_sync().size(), torch.Size([3]))
    equal(rref.rpc_async().view(3, 1).wait(), torch.full((3, 1), 2.0))
    equal(rref.remote().add(1).to_here(), torch.full((3,), 3.0))


@case(sizes=(1, 4))
def get_type(world: World) -> None:
    for to in (world.name(), world.next):
        assert rpc.remote(to, Account)._get_type() is Account
        assert rpc.remote(to, Account)._get_type(blocking=False).wait() is Account
        assert rpc.remote(to, torch.add, args=(torch.ones(1), 1))._get_type(timeout=20) is Tensor
    with pytest.raises(ValueError, match="not to be had"):
        rpc.remote(world.next, raise_value_error)._get_type()
    with pytest.raises(ValueError, match="not to be had"):
        rpc.remote(world.next, raise_value_error)._get_type(blocking=False).wait()


@case(each=CREATE)
def creation_future(world: World, create: Any) -> None:
    for to in world.everyone:
        for _ in range(50):
            rref = create(to)
            rref._get_future().wait()
            # torch's own entry points confirm in a callback of that future, which wait() does not wait for.
            if world.mpi:
                assert rref.confirmed_by_owner()
            else:
                eventually(rref.confirmed_by_owner, "the owner's answer has confirmed the RRef")


@case()
def description_and_equality(world: World) -> None:
    mine, theirs = RRef(1), rpc.remote(world.next, identity, args=(1,))
    assert str(mine).startswith(f"OwnerRRef(GloballyUniqueId(created_on={world.rank}, local_id=")
    assert str(theirs).startswith(f"UserRRef(RRefId = GloballyUniqueId(created_on={world.rank}, local_id=")
    assert theirs.owner() == rpc.get_worker_info(world.next)


# Copies


@case(sizes=(2, 4, 6))
def passed_round_the_world(world: World) -> None:
    route = [world.name(world.rank + hop) for hop in range(1, 2 * world.size)]
    value = torch.full((5,), float(world.rank))
    for rref in (RRef(value), rpc.remote(world.next, identity, args=(value,))):
        equal(forward_along(rref, route), value)


@case()
def passed_before_it_exists(world: World) -> None:
    """A copy of an RRef whose value is still being made waits for it."""
    started, go = world.event("started"), world.event("go")
    rref = rpc.remote(world.next, signal_and_wait, args=(started, go))
    third = rpc.rpc_async(world.name(world.rank + 2), fetch, args=(rref,))
    started.wait()
    assert not third.done()
    go.signal("made")
    equal(third.wait(), "made")


def sum_of_proxy(rref: RRef, owner: str) -> Any:
    return rref.rpc_async().sum()


def sum_by_function(rref: RRef, owner: str) -> Any:
    return rpc.rpc_async(owner, local_sum, args=(rref,))


def sum_by_script(rref: RRef, owner: str) -> Any:
    return rpc.rpc_async(owner, script_sum, args=([rref],))


SUMS = {"proxy": sum_of_proxy, "function": sum_by_function, "script": sum_by_script}


@case(each=SUMS, options={"num_worker_threads": 2})
def made_from_large_tensors_that_questions_for_the_values_pass(world: World, ask: Any) -> None:
    """The questions arrive first, and there are more of them than the owner has threads."""
    large = torch.ones(1_000_000)
    rrefs = [rpc.remote(world.next, torch.mul, args=(large, factor)) for factor in range(6)]
    for factor, future in enumerate([ask(rref, world.next) for rref in rrefs]):
        equal(future.wait(), torch.tensor(factor * 1e6))
    with dist_autograd.context():  # in which the calls that make the values come inside others
        leaf = large.requires_grad_()
        rrefs = [rpc.remote(world.next, torch.mul, args=(leaf, factor)) for factor in range(6)]
        for factor, future in enumerate([ask(rref, world.next) for rref in rrefs]):
            equal(future.wait().detach(), torch.tensor(factor * 1e6))


@case()
def returned_from_calls(world: World) -> None:
    made_there = rpc.rpc_sync(world.next, new_here, args=(7,))
    equal((made_there.to_here(), made_there.owner_name()), (7, world.next))
    third = world.name(world.rank + 2)
    made_elsewhere = rpc.rpc_sync(world.next, new_elsewhere, args=(third, 8))
    equal((made_elsewhere.to_here(), made_elsewhere.owner_name()), (8, third))
    nested = rpc.remote(world.next, new_elsewhere, args=(third, 9))
    equal(nested.to_here().to_here(), 9)
    equal(rpc.rpc_sync(world.next, new_elsewhere, args=(world.name(), 10)).local_value(), 10)


@case()
def sent_to_its_owner(world: World) -> None:
    rref = rpc.remote(world.next, identity, args=(torch.ones(2),))
    equal(rpc.rpc_sync(world.next, fetch, args=(rref,)), torch.ones(2))
    equal(rpc.remote(world.next, fetch, args=(rref,)).to_here(), torch.ones(2))
    equal(rpc.rpc_sync(world.next, describe, args=(rref,)), (True, True, world.next, (world.rank + 1) % world.size))


@case()
def inside_containers(world: World) -> None:
    rrefs = [rpc.remote(to, identity, args=(to,)) for to in world.everyone]
    back = rpc.rpc_sync(world.next, identity, args=({"rrefs": rrefs, "tensor": torch.ones(2)},))
    equal([rref.to_here() for rref in back["rrefs"]], world.everyone)


@case()
def in_torchscript(world: World) -> None:
    rref = rpc.remote(world.next, torch.add, args=(torch.ones(3), 1))
    third, value = world.name(world.rank + 2), torch.full((3,), 2.0)
    equal(script_to_here(rref), value)
    equal(rpc.rpc_sync(third, script_to_here, args=(rref,)), value)
    equal(rpc.rpc_sync(third, script_describe, args=(rref,)), (False, True, world.next))
    equal(rpc.rpc_sync(world.next, script_local_value, args=(rref,)), value)
    equal(rpc.rpc_sync(third, script_pass_on, args=(rref,)).to_here(), value)
    equal(rpc.remote(third, script_pass_on, args=(rref,)).to_here().to_here(), value)
    with pytest.raises(RuntimeError, match=r"Can't call RRef.local_value\(\) on a non-owner RRef"):
        script_local_value(rref)


@case()
def pickling_outside_of_rpc_is_refused(world: World) -> None:
    with pytest.raises(RuntimeError, match="Can not pickle rref in python pickler"):
        pickle.dumps(RRef(1))


# Errors


@case(tensorpipe="to_here() waits until its time is over, and a graceful shutdown without end")
def creation_that_fails_when_to_here_has_begun(world: World) -> None:
    started, go = world.event("started"), world.event("go")
    rref = rpc.remote(world.next, identity, args=(RaisesAtTheCallee(started, go),))
    started.wait()
    with ThreadPoolExecutor(1) as threads:
        fetched = threads.submit(rref.to_here)
        active = ("agent.server_active_calls",)  # the creation, the fetch, and the question itself
        eventually(lambda: rpc.rpc_sync(world.next, debug_info, args=active) >= 3, "the value is being fetched")
        go.signal()
        with pytest.raises(RuntimeError, match="not to be had"):
            fetched.result()
    with pytest.raises((RuntimeError, ValueError), match="not to be had"):
        rpc.rpc_sync(world.next, fetch, args=(rref,))


@case()
def remote_errors(world: World) -> None:
    with pytest.raises(ValueError, match="not to be had"):
        rpc.remote(world.next, raise_value_error).to_here()
    with pytest.raises(ValueError, match="not to be had"):
        rpc.remote(world.name(), raise_value_error).to_here()
    with pytest.raises(RuntimeError, match="size"):
        rpc.remote(world.next, torch.add, args=(torch.ones(2), torch.ones(3))).to_here()
