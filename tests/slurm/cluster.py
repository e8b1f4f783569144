"""A Slurm of two nodes on this machine, for as long as a command runs: python cluster.py COMMAND [ARGUMENTS...].

As root, with Debian's packages slurm-wlm, munge and libpmix-dev (without which srun has no --mpi=pmix). All its files
lie in a directory of its own, its daemons listen at free ports, and nothing of it is left. The nodes are named as this
host and "localhost", so that both names can be found, and seem to have 8 cores each. Jobs of partition "urgent" take
the place of those of "all", as SIGTERM and 3 s later SIGKILL tell them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

START_LIMIT = 120.0  # seconds, on a busy machine
END_LIMIT = 30.0

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
FirstJobId={first_job}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=3
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
NodeName={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 State=UNKNOWN
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={other_port} CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=3
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Gives the environment in which srun, sbatch and salloc use it. For the main thread: it ends at SIGTERM, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        directory.chmod(0o755)
        key = directory / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host = socket.gethostname().partition(".")[0]
        configuration = directory / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                host=host,
                directory=directory,
                controller_port=_free_port(),
                port=_free_port(),
                other_port=_free_port(),
                # MPICH finds what a job that was killed has left in /dev/shm by the job's id.
                first_job=secrets.randbelow(10**6) + 1,
            )
        )
        for name in ("state", f"spool.{host}", "spool.localhost"):
            (directory / name).mkdir()
        environment = {**os.environ, "SLURM_CONF": str(configuration)}
        munge = {"key-file": key, **{f"{name}-file": directory / f"munged.{name}" for name in ("pid", "log", "seed")}}
        options = [f"--{name}={value}" for name, value in munge.items()]
        daemons = (
            ["munged", "--foreground", "--force", f"--socket={directory}/munge.socket", *options],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", host],
            ["slurmd", "-D", "-N", "localhost"],
        )
        for command in daemons:
            stack.enter_context(_running([f"/usr/sbin/{command[0]}", *command[1:]], environment, directory))
            _wait(lambda: (directory / "munge.socket").exists(), directory, "munged")
        _wait(
            lambda: _said("sinfo", "--noheader", "--format=%T", environment=environment) == "idle", directory, "Slurm"
        )
        stack.callback(_end_jobs, environment, directory)
        yield environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], directory: Path) -> Iterator[None]:
    with open(directory / f"{Path(command[0]).name}.out", "a") as output:
        daemon = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        daemon.terminate()
        try:
            daemon.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _nodes(environment: dict[str, str]) -> list[str]:
    """Their states."""
    return _said("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T", environment=environment).split()


def _said(*command: str, environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def _wait(done: Callable[[], bool], directory: Path, what: str, limit: float = START_LIMIT) -> None:
    end = time.monotonic() + limit
    while not done():
        if time.monotonic() > end:
            logs = "\n".join(f"== {file.name}\n{file.read_text()}" for file in sorted(directory.glob("*.out")))
            raise TimeoutError(f"{what} is not as it should be after {limit:.0f} s:\n{logs}")
        time.sleep(0.1)


def _end_jobs(environment: dict[str, str], directory: Path) -> None:
    subprocess.run(["scancel", "--signal=KILL", "--me"], env=environment)
    subprocess.run(["scancel", "--me"], env=environment)
    _wait(lambda: not _said("squeue", "--noheader", environment=environment), directory, "the end of jobs", END_LIMIT)


def main() -> int:
    with cluster() as environment:
        return subprocess.run(sys.argv[1:], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
