"""Programs that end, or fail to begin, in a special way: each has a launch of its own."""

from __future__ import annotations

import pytest
import torch.distributed.rpc as rpc
from cases_calls import identity
from cases_rref import Account
from harness import World, equal, program

# RRefs at the end. Not cases: torch's RRef context keeps the first session's agent for the life of the process.


@program()
def shutdown_ignores_living_rrefs(world: World) -> None:
    world.init()
    rref = rpc.remote(world.next, identity, args=(1,))
    equal(rref.to_here(), 1)
    rpc.shutdown()
    with pytest.raises(RuntimeError, match=r"Cannot call to_here\(\) on it after deletion"):
        rref.to_here()


@program()
def shutdown_reports_leaks_when_asked_to(world: World) -> None:
    world.init()
    rref = rpc.remote(world.next, identity, args=(1,))
    equal(rref.to_here(), 1)
    world.barrier()
    rpc.api._ignore_rref_leak = False
    # Graceful shutdown would delete the RRefs for the user first, and so find no leak.
    rpc.api._delete_all_user_and_unforked_owner_rrefs = lambda: None
    with pytest.raises(RuntimeError, match="Leaking RRef"):
        rpc.shutdown()
    assert not rpc.api._is_current_rpc_agent_set()


@program()
def shutdown_finds_no_leak_when_all_is_deleted(world: World) -> None:
    world.init()
    rref = rpc.remote(world.next, Account, args=(1,))
    equal(rref.rpc_sync().deposit(1), 2)
    del rref
    rpc.api._ignore_rref_leak = False
    rpc.shutdown()
