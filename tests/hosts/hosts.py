"""Deaths and outages across hosts, which are imitated by network and process namespaces: python hosts.py [KILLS].

As root. Three ranks, each alone on its host, joined by a bridge. Rank 2 is killed while all are idle, and while all
call all, KILLS times each; then its link is down for less, and for more, than heartbeat_timeout. Prints a line for each
case, and ends with status 1 if one is not as it should be. What the user's environment says of MPI's networks holds.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

SIZE = 3
RANK = str(Path(__file__).with_name("rank.py"))
LIMIT = 60.0  # seconds, beyond what a case itself takes


def system(commands: str) -> None:
    for command in commands.strip().splitlines():
        subprocess.run(shlex.split(command), check=True, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """A bridge, and a namespace for each host, with a link to it."""
    system("ip link add trm-bridge type bridge\nip link set trm-bridge up")
    try:
        for host in range(SIZE):
            system(f"""
                ip netns add trm-host{host}
                ip link add trm-link{host} type veth peer name trm-end{host}
                ip link set trm-end{host} netns trm-host{host}
                ip link set trm-link{host} master trm-bridge up
                ip netns exec trm-host{host} ip addr add 10.77.77.{host + 1}/24 dev trm-end{host}
                ip netns exec trm-host{host} ip link set trm-end{host} up
                ip netns exec trm-host{host} ip link set lo up
            """)
        yield
    finally:
        for host in range(SIZE):
            for command in (f"ip link del trm-link{host}", f"ip netns del trm-host{host}"):
                subprocess.run(command.split(), stderr=subprocess.DEVNULL, check=False)
        system("ip link del trm-bridge")


class World:
    """The ranks of a case, ready."""

    def __init__(self, heartbeat_timeout: float, pace: str) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.path = Path(self._directory.name)
        self._processes = [self._start(rank, str(heartbeat_timeout), pace) for rank in range(SIZE)]
        self._await("ready", range(SIZE), LIMIT)

    def _start(self, rank: int, *arguments: str) -> subprocess.Popen[bytes]:
        host = ["ip", "netns", "exec", f"trm-host{rank}", "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command = [*host, sys.executable, RANK, str(rank), str(SIZE), str(self.path), *arguments]
        with open(self.path / f"{rank}.output", "w") as output:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._directory.cleanup()

    def _await(self, what: str, ranks: range, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not all((self.path / f"{rank}.{what}").exists() for rank in ranks):
            for rank in ranks:
                assert self._processes[rank].poll() is None, self.output_of(rank)
            assert time.monotonic() < deadline, "\n".join(map(self.output_of, ranks))
            time.sleep(0.01)

    def output_of(self, rank: int) -> str:
        return f"rank {rank} ended, or hangs:\n{(self.path / f'{rank}.output').read_text()[-3000:]}"

    def kill(self) -> float:
        """Rank 2. Returns the time."""
        rank = psutil.Process(self._processes[2].pid).children(recursive=True)[-1]
        when = time.time()
        rank.send_signal(signal.SIGKILL)
        return when

    def reports(self, ranks: range, limit: float = LIMIT) -> list[dict[str, Any]]:
        """Ends the case, in which these are to have survived."""
        (self.path / "over").touch()
        self._await("json", ranks, limit)
        reports = [json.loads((self.path / f"{rank}.json").read_text()) for rank in ranks]
        (self.path / "leave").touch()
        for rank in ranks:
            assert self._processes[rank].wait(LIMIT) == 0, self.output_of(rank)
        return reports


def check_loss(report: dict[str, Any], why: str) -> list[float]:
    """Rank 2 alone is lost. When that was, as the calls have seen it."""
    assert report["lost"] == ["worker2"], report
    for worker, _, text in report["errors"]:
        assert worker == "worker2" and "'worker2' " in text and why in text, report  # noqa: PT018
    return [when for _, when, _ in report["errors"]]


def kills(pace: str, count: int) -> str:
    times: list[float] = []
    for _ in range(count):
        with World(10, pace) as world:
            time.sleep(1)
            killed = world.kill()
            time.sleep(2)
            for report in world.reports(range(2)):
                times += [when - killed for when in check_loss(report, "has ended without leaving")]
    found = f": found after {statistics.median(times):.2f} s, at most {max(times):.2f} s" if times else ""
    assert max(times, default=0) < 2, found
    return f"{count} kills{found}"


def outage(seconds: float, heartbeat_timeout: float) -> str:
    with World(heartbeat_timeout, "waits") as world:
        time.sleep(1)
        system("ip link set trm-link2 down")
        time.sleep(seconds)
        system("ip link set trm-link2 up")
        time.sleep(1)
        reports = world.reports(range(SIZE), LIMIT + 2 * seconds)
    assert all(report["lost"] == [] and report["errors"] == [] for report in reports), reports
    return f"nothing lost, the longest call took {max(report['longest'] for report in reports):.1f} s"


def gone(heartbeat_timeout: float) -> str:
    with World(heartbeat_timeout, "waits") as world:
        time.sleep(1)
        down = time.time()
        system("ip link set trm-link2 down")
        time.sleep(3 * heartbeat_timeout)
        reports = world.reports(range(SIZE))
    times = [when - down for report in reports[:2] for when in check_loss(report, "nothing was heard of it")]
    assert sorted(reports[2]["lost"]) == ["worker0", "worker1"], reports[2]
    assert len(times) == 4, reports
    assert max(times) < heartbeat_timeout + 2, times
    return f"given up after {max(times):.1f} s"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    cases: dict[str, Callable[[], str]] = {
        "killed while all are idle": lambda: kills("idle", count),
        "killed while all wait for answers": lambda: kills("waits", count),
        "killed while all stream calls": lambda: kills("streams", count),
        "link down for 5 s, heartbeat_timeout 10": lambda: outage(5, 10),
        "link down for good, heartbeat_timeout 3": lambda: gone(3),
    }
    failed = False
    with network():
        for name, case in cases.items():
            try:
                print(f"{name}: {case()}", flush=True)
            except AssertionError as error:
                failed = True
                print(f"{name}: FAILED\n{error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
