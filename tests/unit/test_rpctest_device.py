"""The device of tests/device, with which the engine is tested, does what those tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit_fakes import RunPython

DEVICE = Path(__file__).parents[1] / "device"
PROGRAMS = {
    "device_programs": [
        "copies_wait_for_nobody",
        "seeds_show_missing_waits",
        "recorded_streams_keep_memory",
        "freed_memory_is_overwritten",
        "operators_are_queued",
        "a_model_trains_across_devices",
        "contexts_appear_where_cuda_makes_them",
        "queries_spoil_captures",
        "what_is_made_is_counted",
        "a_forked_child_has_no_device",
    ],
    "device_ipc_programs": [
        "memory_and_events_cross_processes",
        "handles_are_refused",
        "the_dead_are_not_awaited",
    ],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PROGRAMS.items() for name in names])
def test_device(run_forked: RunPython, module: str, name: str) -> None:
    run_forked(f"import {module}\n{module}.{name}()", path=(DEVICE,), RPCTEST_SEED="1")
