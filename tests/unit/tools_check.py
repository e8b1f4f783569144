"""What a fact has to say, for the tests of the commands."""

from __future__ import annotations

from torch_rpc_mpi.tools.facts import Fact, Status

MPICH = "MPICH Version:      5.0.2\nMPICH Release date: today\nMPICH Device:       ch4:ucx,ofi\n"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI"


def check(fact: Fact, status: Status, *words: str) -> None:
    """Its status, and words of its value or its remedy; what works only in part has a remedy."""
    assert fact.status is status, fact
    text = f"{fact.value} -- {fact.remedy}"
    assert all(word in text for word in words), text
    assert fact.remedy or status in (Status.OK, Status.NOTE), fact
