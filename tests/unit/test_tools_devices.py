"""What the doctor makes of accelerators: imagined ones, and those of the test device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools_check import check
from unit_fakes import RunPython

from torch_rpc_mpi.tools import device_paths, devices
from torch_rpc_mpi.tools.device_paths import Path as DevicePath
from torch_rpc_mpi.tools.devices import Devices
from torch_rpc_mpi.tools.facts import Fact, Status
from torch_rpc_mpi.tools.place import Place
from torch_rpc_mpi.tools.trial import Trial

OK, NOTE, WARNING, PROBLEM = Status
DEVICE = Path(__file__).parents[1] / "device"
TWO = Devices("cuda", ("H100", "H100"), ("a-1", "b-2"), "/env/libcudart.so.12")
ONE = Devices("cuda", ("H100",), ("a-1",), "/env/libcudart.so.12")
HIDDEN = {"CUDA_VISIBLE_DEVICES": "3"}
UNSEEN = "the device GPU-7 of the sender is not visible to the receiver. Let each rank see all"


class TestOfOneRank:
    def test_a_build_for_the_cpu_is_one_line(self) -> None:
        assert devices.facts(Trial(), Place(), {}) == [Fact("devices", "none: this torch is a build for the CPU")]

    def test_a_driver_that_ends_the_process(self) -> None:
        looked = Trial({"kind": "cuda"}, "torch.cuda.device_count()", "the process was killed by SIGSEGV")
        (fact,) = devices.facts(looked, Place(), {})
        check(fact, WARNING, "torch.cuda.device_count() failed", "SIGSEGV", "nvidia-smi")
        assert devices.found_by(looked).sendable == 0

    def test_none_that_torch_sees(self) -> None:
        check(devices.seen(Devices("cuda"), {}), NOTE, "none that torch sees", "driver")
        check(devices.seen(Devices("cuda"), HIDDEN), NOTE, "CUDA_VISIBLE_DEVICES=3", "unset CUDA_VISIBLE_DEVICES")

    def test_their_names(self) -> None:
        check(devices.seen(TWO, {}), OK, "2 devices that torch sees: cuda:0 H100, cuda:1 H100")

    def test_the_runtime_library(self) -> None:
        check(devices.runtime(ONE), OK, "/env/libcudart.so.12")
        check(devices.runtime(Devices("xpu", ("A",), refusal="no library")), WARNING, "cannot be sent: no library")

    @pytest.mark.parametrize(
        ("own", "environ", "place", "status"),
        [
            (ONE, HIDDEN, Place("mpirun", 0, 4, 4), WARNING),
            (TWO, HIDDEN, Place("mpirun", 0, 4, 4), NOTE),
            (ONE, HIDDEN, Place("mpirun", 0, 4, 1), NOTE),
            (ONE, {"RPCTEST_VISIBLE_DEVICES": "1"}, Place("mpirun", 0, 4, 4), None),  # of another kind
            (ONE, {}, Place("mpirun", 0, 4, 4), None),
        ],
    )
    def test_hidden_ones(self, own: Devices, environ: dict[str, str], place: Place, status: Status | None) -> None:
        looked = Trial({"kind": own.kind, "names": list(own.names), "library": own.library})
        found = [fact for fact in devices.facts(looked, place, environ) if fact.key == "visible_devices"]
        assert [fact.status for fact in found] == ([] if status is None else [status])
        for fact in found:
            check(fact, fact.status, "CUDA_VISIBLE_DEVICES=3: this process sees")

    def test_whether_memory_can_be_shared(self) -> None:
        check(devices.sharing(TWO, {}, []), OK, "can be shared")
        exclusive = devices.modes_in("GPU-a-1, Default\nGPU-b-2, Exclusive_Process\n")
        check(
            devices.sharing(TWO, exclusive, ["ipc"]), WARNING, "cuda:1 in compute mode Exclusive_Process", "-c DEFAULT"
        )
        check(devices.sharing(TWO, devices.modes_in("GPU-a-1, Default\n"), []), OK)
        apart = Devices("cuda", TWO.names, TWO.uuids, TWO.library, apart=[(0, 1), (1, 0)])
        check(devices.sharing(apart, {}, []), NOTE, "cuda 0-1 cannot use each other's", "topo")
        check(devices.sharing(TWO, {}, ["ipc", "pid"]), NOTE, "(ipc, pid)", "--ipc=host --pid=host")


class TestOfAllRanks:
    HOSTS = ("north", "north", "south", "south")

    def test_each_rank_has_the_device_of_its_number_on_its_host(self) -> None:
        ranks = [{"host": host} for host in self.HOSTS]
        assert device_paths.choose(ranks, [TWO, TWO, ONE, ONE]) == ["cuda:0", "cuda:1", "cuda:0", "cuda:0"]
        without = Devices("cuda", ("H100",), refusal="no library")
        assert device_paths.choose(ranks, [Devices(), TWO, without, Devices("xpu", ("A",), library="x")]) == [
            "",
            "cuda:1",
            "",
            "",
        ]
        assert device_paths.choose(ranks, [Devices()] * 4) == [""] * 4

    def test_nothing_is_said_without_devices(self) -> None:
        assert list(device_paths.verdicts([], self.HOSTS)) == []

    def test_what_keeps_pairs_of_a_host_from_sharing_is_told_once(self) -> None:
        paths = [
            DevicePath(0, 1, "ipc"),
            DevicePath(1, 0, "ipc"),
            DevicePath(2, 3, "pinned", UNSEEN),
            DevicePath(3, 2, "pinned", UNSEEN),
            DevicePath(0, 2, "pinned"),
        ]
        summary, closed = device_paths.verdicts(paths, self.HOSTS)
        check(summary, OK, "ipc in 2 of 5 ways, pinned in 3 of 5 ways")
        check(
            closed, WARNING, "rank 2 (south) to rank 3 (south); rank 3", "GPU-7 of the sender", "-- Let each rank see"
        )

    def test_those_that_have_no_link_or_were_told_so(self) -> None:
        _, closed, told = device_paths.verdicts(
            [DevicePath(0, 1, "pinned", "devices 0 and 1 cannot"), DevicePath(1, 0, "pinned")], self.HOSTS
        )
        check(closed, WARNING, "devices 0 and 1 cannot", "topo")
        check(told, NOTE, "rank 1 (north) to rank 0 (north)", "device_path")

    def test_those_by_mpi(self) -> None:
        summary, closed, told = device_paths.verdicts(
            [DevicePath(0, 1, "mpi", UNSEEN), DevicePath(1, 0, "mpi"), DevicePath(0, 2, "mpi")], self.HOSTS
        )
        check(summary, OK, "mpi in 3 of 3 ways")
        check(closed, WARNING, "rank 0 (north) to rank 1 (north): by MPI: ", "-- Let each rank see")
        check(told, NOTE, "rank 1 (north) to rank 0 (north): by MPI, as device_path says")

    def test_calls_that_fail(self) -> None:
        _, failed = device_paths.verdicts([DevicePath(0, 2, "", error="out of memory")], self.HOSTS)
        check(failed, PROBLEM, "rank 0 (north) to rank 2 (south): failed: out of memory")


LOOK = """
import json, os
import rpctest_device, torch_rpc_mpi
from torch_rpc_mpi.tools import devices
from torch_rpc_mpi.tools.place import Place

{register}
looked = devices.look()
facts = devices.facts(looked, Place("mpirun", 0, 2, 2))
assert rpctest_device.contexts() == []  # of this process
print(json.dumps([devices.found_by(looked).sendable, [fact.as_json() for fact in facts]]))
"""
REGISTER = 'torch_rpc_mpi.register_device_runtime("rpctest", rpctest_device.LIBRARY, rpctest_device.PREFIX)'


def look(run: RunPython, register: str, **environment: str) -> tuple[int, dict[str, Fact]]:
    count, facts = json.loads(run(LOOK.format(register=register), path=(DEVICE,), **environment))
    return count, {fact["key"]: Fact.from_json(fact) for fact in facts}


class TestOfTheTestDevice:
    def test_two(self, run_forked: RunPython) -> None:
        count, facts = look(run_forked, REGISTER)
        assert count == 2
        check(facts["devices"], OK, "2 devices that torch sees: rpctest:0 test device, rpctest:1")
        check(facts["device_runtime"], OK, "rpctest.so, with all")
        assert "visible_devices" not in facts
        assert "can be shared" in facts["device_memory"].value

    def test_one_that_is_hidden(self, run_forked: RunPython) -> None:
        count, facts = look(run_forked, REGISTER, RPCTEST_VISIBLE_DEVICES="1")
        assert count == 1
        check(facts["visible_devices"], WARNING, "RPCTEST_VISIBLE_DEVICES=1: this process sees 1 device")

    def test_two_without_a_link(self, run_forked: RunPython) -> None:
        _, facts = look(run_forked, REGISTER, RPCTEST_NO_PEER="1")
        check(facts["device_memory"], NOTE, "rpctest 0-1 cannot use each other's")

    def test_without_a_runtime(self, run_forked: RunPython) -> None:
        count, facts = look(run_forked, "")
        assert count == 0
        check(facts["device_runtime"], WARNING, "no runtime library for devices of type")
        assert "device_memory" not in facts
