"""How the processes of a session meet in a store, in which others may have left traces.

Note [Meeting in a store]
~~~~~~~~~~~~~~~~~~~~~~~~~
A store serves several sessions, and may hold what processes have written that are gone: torchrun starts its workers
again with the same one. So a key does not say that its writer lives. Each attempt of a process to meet the others has
a token of its own (``Member.fresh``). Every rank writes itself to its place, over whatever is there. Rank 0 proposes
those whom it finds in the places, and others when one of them changes; a process that finds itself in a proposal agrees
to it. When all have agreed, which only processes that live can, rank 0 confirms, and the session has the keys beneath
the proposal for itself.

A process that waits and finds another one in its place knows that there are two with its rank. It says so as its own
problem, which rank 0 then confirms to all.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from ._system import Limits
from ._torch_api import PrefixStore, Store

if TYPE_CHECKING:
    from . import _C

logger = logging.getLogger("torch_rpc_mpi")

_WARN_AFTER = 10.0  # seconds
_LONGEST_PAUSE = 0.05  # seconds
_LOSS_IS_SEEN = 1.0  # seconds after it
_GAVE_UP = "-"  # in the place of one whose time is over


@dataclasses.dataclass(frozen=True)
class Membership:
    """A process's place in the world that it has formed with others."""

    world: str
    rank: int


@dataclasses.dataclass(frozen=True)
class Member:
    """What a rank tells the others when it checks in."""

    name: str
    node: str
    host: str
    pid: int
    mpi: str  # library and version
    membership: Membership | None
    problem: str | None  # why it cannot take part
    limits: Limits = dataclasses.field(default_factory=Limits)
    process_space: str = ""  # where its pid means this process
    fresh: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)  # unique; rank 0's names a new world

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid} on {self.host})"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Member:
        fields = json.loads(text)
        if fields["membership"] is not None:
            fields["membership"] = Membership(**fields["membership"])
        fields["limits"] = Limits(**fields["limits"])
        return Member(**fields)


def meet(store: Store, me: Member, rank: int, size: int, deadline: float) -> tuple[Store, list[Member]]:
    """Tells the others of this process and learns of them. Returns a store of this session's own, and all members.

    Raises:
        TimeoutError: some did not come; the text names them.
        RuntimeError: another process has this rank.
    """
    if size == 1:  # processes that are alone have nobody to meet, and may be many with one store
        return PrefixStore(f"1/{me.fresh}", store), [me]
    meeting = _Meeting(PrefixStore(str(size), store), me, rank, size)
    try:
        _poll(meeting.step, meeting.missing, size, deadline, "call init_rpc")
    except BaseException:  # the time is over, or a signal's handler has raised
        meeting.leave()
        raise
    proposal, members = meeting.result()
    return PrefixStore(f"{size}/{proposal}", store), members


def await_all(session: Store, stage: str, size: int, deadline: float, what: str, companions: _C.Companions) -> None:
    """Waits for every rank's key of a stage, at which it has done ``what``, while all live."""
    keys = [f"{stage}/{rank}" for rank in range(size)]

    def came() -> bool:
        companions.check()
        try:
            return session.check(keys)
        except RuntimeError:  # of the store, whose holder may be the one that has ended
            companions.check(_LOSS_IS_SEEN)
            raise

    def missing() -> list[int]:
        return [rank for rank, key in enumerate(keys) if not session.check([key])]

    _poll(came, missing, size, deadline, what)


class _Meeting:
    """One process's attempt to meet the others."""

    def __init__(self, places: Store, me: Member, rank: int, size: int) -> None:
        self._places, self._me, self._rank = places, me, rank
        self._keys = [f"member/{other}" for other in range(size)]
        self._mine = me.to_json()
        self._proposed: list[str] = []  # by this process, if it is rank 0
        self._proposals = 0
        self._agreed: dict[str, list[str]] = {}  # the members of each proposal
        places.set(self._keys[rank], self._mine)

    def step(self) -> bool:
        """Does what can be done now. Returns whether a proposal is confirmed to which this process has agreed."""
        if not self._confirmed():  # else its place may be another's already, in the next session
            self._look_at_own_place()
            if self._rank == 0:
                self._lead()
            self._agree()
        return bool(self._confirmed())

    def result(self) -> tuple[str, list[Member]]:
        """The confirmed proposal and its members, once step() has returned true."""
        proposal = self._confirmed()[0]
        return proposal, [Member.from_json(text) for text in self._agreed[proposal]]

    def _confirmed(self) -> list[str]:
        return [proposal for proposal in self._agreed if self._places.check([f"{proposal}/confirmed"])]

    def missing(self) -> list[int]:
        """The ranks that are waited for, as far as can be seen from here."""
        texts = self._texts()
        absent = [rank for rank, text in enumerate(texts) if text is None]
        if not absent:
            absent = self._silent()
        # Others run out of time as this one does; they are not those whom it has waited for.
        gave_up = [rank for rank, text in enumerate(texts) if text == _GAVE_UP]
        return [rank for rank in absent if rank not in gave_up] or gave_up

    def _silent(self) -> list[int]:
        """Those who do not answer though they are in their places, which they may have died in."""
        proposal = self._current_proposal()
        if proposal not in self._agreed:
            return [0]
        ranks = range(len(self._keys))
        # Rank 0, if it has not confirmed what all have agreed to.
        return [rank for rank in ranks if not self._places.check([f"{proposal}/agreed/{rank}"])] or [0]

    def leave(self) -> None:
        """Lets another attempt of this rank meet those that come late."""
        if self._texts()[self._rank] == self._mine:
            self._places.set(self._keys[self._rank], _GAVE_UP)

    def _texts(self) -> list[str | None]:
        return [self._places.get(key).decode() if self._places.check([key]) else None for key in self._keys]

    def _current_proposal(self) -> str | None:
        return self._places.get("proposal").decode() if self._places.check(["proposal"]) else None

    def _look_at_own_place(self) -> None:
        text = self._places.get(self._keys[self._rank]).decode()
        if text == self._mine:
            return
        if text == _GAVE_UP:  # another one, which had taken it
            self._places.set(self._keys[self._rank], self._mine)
            return
        other = Member.from_json(text)
        if other.problem is not None:
            raise RuntimeError(f"init_rpc failed: {other.problem}")
        problem = (
            f"there are two processes with rank {self._rank} of {len(self._keys)}, {self._me} and {other}. Give every "
            "process a rank of its own"
        )
        self._me = dataclasses.replace(self._me, problem=problem)
        self._mine = self._me.to_json()
        self._places.set(self._keys[self._rank], self._mine)

    def _agree(self) -> None:
        proposal = self._current_proposal()
        if proposal is None or proposal in self._agreed:
            return
        members = json.loads(self._places.get(f"{proposal}/members"))
        if self._mine in members:
            self._agreed[proposal] = members
            self._places.set(f"{proposal}/agreed/{self._rank}", "")

    def _lead(self) -> None:
        if not self._places.check(self._keys):
            return
        texts = [self._places.get(key).decode() for key in self._keys]
        if _GAVE_UP in texts or texts[self._rank] != self._mine:
            return
        if texts != self._proposed:
            self._proposed = texts
            self._proposals += 1
            self._places.set(f"{self._own_proposal()}/members", json.dumps(texts))
            self._places.set("proposal", self._own_proposal())
        proposal = self._own_proposal()
        troubled = any(Member.from_json(text).problem is not None for text in texts)
        if troubled or self._places.check([f"{proposal}/agreed/{rank}" for rank in range(len(texts))]):
            self._places.set(f"{proposal}/confirmed", "")

    def _own_proposal(self) -> str:
        return f"{self._me.fresh}/{self._proposals}"


def _poll(done: Callable[[], bool], missing: Callable[[], list[int]], size: int, deadline: float, what: str) -> None:
    """Waits until it is ``done``, for ranks that are to do ``what``."""
    begin = time.monotonic()
    between_warnings = _WARN_AFTER
    warn_at = begin + between_warnings
    # Not the store's own wait(): no handler of a signal runs meanwhile, and a TCPStore logs each one that runs out.
    while not done():
        now = time.monotonic()
        waited = now - begin
        if now >= min(warn_at, deadline):
            ranks = missing()
            who = f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))} of {size}"
            if ranks and now >= deadline:
                raise TimeoutError(
                    f"{who} did not {what} within {waited:.3g} s. Check that every process is given the same "
                    "world_size, a rank of its own and the same init_method, see their output for an earlier error, or "
                    "raise init_timeout."
                )
            if ranks:
                logger.warning("still waiting after %.3g s for %s to %s", waited, who, what)
            between_warnings *= 2
            warn_at += between_warnings
        # So that looking prolongs no wait by more than an eighth, and late ranks do not flood the store.
        time.sleep(min(max(waited / 8, 0.001), _LONGEST_PAUSE, max(deadline - now, 0.001)))
