"""torch's all-gather over RPC while a worker is lost, without other processes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator

import pytest
from test_session import PREAMBLE
from unit_fakes import RunPython

from torch_rpc_mpi import _all_gather, _waiting

WAIT_LIMIT = 60.0


@pytest.fixture
def hopeless() -> Iterator[Callable[[Callable[[], str | None]], None]]:
    """Sets what says why this thread's all-gather cannot succeed."""

    def set_reason(function: Callable[[], str | None]) -> None:
        _all_gather._this_thread.why_hopeless = function

    yield set_reason
    _all_gather._this_thread.why_hopeless = None


def test_the_wait_goes_on_while_there_is_hope(hopeless: Callable[..., None]) -> None:
    signal = _all_gather._Signal()
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            signal.set()

    hopeless(look)
    assert signal.wait()
    assert len(looks) == 3


def test_the_wait_ends_without_hope(hopeless: Callable[..., None]) -> None:
    hopeless(lambda: "nobody comes")
    with pytest.raises(_all_gather._Hopeless):
        _all_gather._Signal().wait()


def test_who_was_let_go_does_not_mind_that_others_have_left(hopeless: Callable[..., None]) -> None:
    signal = _all_gather._Signal()

    def look() -> str:
        signal.set()  # it arrives after the news that another worker has left
        return "one has left"

    hopeless(look)
    assert signal.wait()


def test_torchs_time_limit_stays(hopeless: Callable[..., None]) -> None:
    hopeless(lambda: None)
    assert not _all_gather._Signal().wait(timeout=0.01)
    assert not _all_gather._Signal().wait(timeout=0)


def test_waits_of_other_threads_have_reasons_of_their_own(hopeless: Callable[..., None]) -> None:
    hopeless(lambda: "nobody comes")
    signal = _all_gather._Signal()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(signal.wait(2 * _waiting.LOOK_INTERVAL)))
    thread.start()
    thread.join(WAIT_LIMIT)
    assert results == [False]


GROUP = """
from torch.distributed.rpc import api
init()
agent = api._get_current_rpc_agent()
mine = agent.get_worker_infos()
agent.get_worker_infos = lambda: [*mine, rpc.WorkerInfo("other", 1), rpc.WorkerInfo("stranger", 2)]

def lose_at_look(number, *lost):
    looks = []
    def lost_workers():
        looks.append(1)
        return list(lost) if len(looks) >= number else []
    agent.lost_workers = lost_workers

def error_of(wait, *arguments, **options):
    try:
        wait(*arguments, **options)
    except RuntimeError as error:
        return str(error)
    raise AssertionError
"""


@pytest.fixture
def run_group(run_forked_with_fakes: RunPython) -> RunPython:
    """Runs a program in a session that takes itself for one of three; the others never come."""
    return functools.partial(run_forked_with_fakes, PREAMBLE + GROUP)


def test_the_error_names_the_lost_worker_that_takes_part(run_group: RunPython) -> None:
    run_group(
        """
lose_at_look(3, (2, "the stranger is gone"), (1, "the other is gone"))
text = error_of(api._all_gather, None, {"alone", "other"})
assert text == "An all-gather over RPC of 'alone', 'other' is not possible: the other is gone", text
assert api._all_gather(7, {"alone"}) == {"alone": 7}
text = error_of(rpc.shutdown)
assert text == (
    "A graceful shutdown of RPC is not possible: the stranger is gone. RPC ends here without the others; "
    "rpc.shutdown(graceful=False) in its place waits for nobody"
), text
"""
    )


def test_an_error_of_torchs_beside_a_loss_is_shown_as_well(run_group: RunPython) -> None:
    run_group(
        """
lose_at_look(3, (1, "the other is gone"))
text, torchs = error_of(api._all_gather, None, {"alone", "other"}, timeout=0.01).split("\\n", 1)
assert text == "An all-gather over RPC of 'alone', 'other' is not possible: the other is gone", text
assert "other" in torchs, torchs
rpc.shutdown(graceful=False)
"""
    )


def test_other_errors_stay_as_they_are(run_group: RunPython) -> None:
    run_group(
        """
lose_at_look(1, (2, "the stranger is gone"))
text = error_of(api._all_gather, None, {"alone", "other"}, timeout=0.01)
assert "other" in text and "stranger" not in text, text
rpc.shutdown(graceful=False)
"""
    )


def test_the_deletion_of_rrefs_ends_with_a_lost_worker(run_group: RunPython) -> None:
    run_group(
        """
import threading
rpc.shutdown(graceful=False)
never = threading.Event()
api._delete_all_user_and_unforked_owner_rrefs = never.wait
init()
agent = api._get_current_rpc_agent()
lose_at_look(4, (0, "the other is gone"))
text = error_of(rpc.shutdown)
assert text.startswith("A graceful shutdown of RPC is not possible: the other is gone. "), text
never.set()
"""
    )


def test_each_session_counts_its_own_rounds(run_group: RunPython) -> None:
    run_group(
        """
lose_at_look(1)
for _ in range(2):
    api._all_gather(None)
rpc.shutdown()
assert api._all_gather_sequence_id == {}, api._all_gather_sequence_id
init()
assert api._all_gather_sequence_id == {}
api._all_gather(None)
assert api._all_gather_sequence_id == {"alone": 1}
assert not api._all_gather_sequence_id_to_states
rpc.shutdown()
"""
    )


def test_a_function_that_was_put_back_after_its_session_is_torchs(run_group: RunPython) -> None:
    run_group(
        """
ours = api._all_gather, api._wait_all_workers, api._delete_all_user_and_unforked_owner_rrefs
lose_at_look(1, (1, "the other is gone"))
rpc.shutdown(graceful=False)
api._all_gather, api._wait_all_workers, api._delete_all_user_and_unforked_owner_rrefs = ours
init()
assert api._all_gather(7) == {"alone": 7}
rpc.shutdown()
"""
    )
