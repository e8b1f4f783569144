"""Runs other people's RPC programs and packages over TensorPipe and over MPI, unmodified, and prints a table.

    python run.py [--runs N] [WORD ...]

The words choose programs by parts of their names. Those of pytorch/examples need a clone of it, which $PYTORCH_EXAMPLES
names; without one they are left out. Only those that need neither a GPU nor data from elsewhere are here.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LIMIT = 600.0  # seconds for one run


class Program(NamedTuple):
    name: str
    file: Path
    arguments: tuple[str, ...] = ()


def programs() -> list[Program]:
    ours = [
        Program("TorchRL: RPC collector", HERE / "torchrl_collector.py"),
        Program("PyG: RPC feature store", HERE / "pyg_features.py", ("PORT",)),
        Program("fairscale: DistributedPipeline", HERE / "fairscale_pipeline.py", ("PORT",)),
    ]
    examples = os.environ.get("PYTORCH_EXAMPLES")
    if not examples:
        return ours
    rpc = Path(examples).resolve() / "distributed" / "rpc"
    return [*ours, Program("examples: rnn", rpc / "rnn" / "main.py")]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def seconds(program: Program, over_mpi: bool) -> float | None:
    """How long one run takes; None, with its output shown, if it failed."""
    arguments = [free_port() if argument == "PORT" else argument for argument in program.arguments]
    command = [sys.executable, *(["-m", "torch_rpc_mpi"] if over_mpi else []), str(program.file), *arguments]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        begin = time.monotonic()
        try:
            child = subprocess.run(
                command, cwd=program.file.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=LIMIT
            )
            status: object = child.returncode
        except subprocess.TimeoutExpired:
            status = f"none within {LIMIT:.0f} s"
        if status == 0:
            return time.monotonic() - begin
        output.seek(0)
        print(f"{' '.join(command)}: status {status}\n{output.read()[-4000:]}", flush=True)
        return None


def shown(times: list[float | None]) -> str:
    return " ".join("failed" if time is None else f"{time:.1f}" for time in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    rows, failed = [], False
    for program in programs():
        if arguments.words and not any(word in program.name for word in arguments.words):
            continue
        times: dict[bool, list[float | None]] = {False: [], True: []}
        for _ in range(arguments.runs):  # in turn, so that a busy machine is so for both
            for over_mpi, of_it in times.items():
                of_it.append(seconds(program, over_mpi))
        failed = failed or None in times[True]
        command = " ".join([program.file.name, *program.arguments])
        rows.append(f"| {program.name} | `{command}` | {shown(times[False])} | {shown(times[True])} |")
        print(rows[-1], flush=True)
    print("\n| program | command, after `python` or `python -m torch_rpc_mpi` | TensorPipe, s | MPI, s |")
    print("|---|---|---|---|")
    print("\n".join(rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
