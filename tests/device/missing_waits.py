"""Leaves out each wait of the engine in turn, and sees whether the device cases fail without it.

    python tests/device/missing_waits.py [--seeds N] [--only TEXT] [--list] [ARGUMENTS OF PYTEST]

A first run of the cases finds the waits: see missing_waits.h. Each is then left out under one seed after another, until
a case fails. What no seed finds is printed last, and makes the exit status 1: either a case is missing, or the wait is
not needed. It takes a run of the cases for each wait, more for those that are hard to find.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = ["tests/multirank/test_cases.py", "-k", "devices"]
LIMIT = 900.0  # seconds, of a run; one that hangs is one that fails


def engine() -> str:
    """The library that pytest's processes load: not the sources', which have none."""
    program = "import torch_rpc_mpi._C as library; print(library.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.strip()


def run_cases(arguments: list[str], seed: int, **environment: str) -> tuple[bool, str]:
    """Whether they passed, and what failed first."""
    command = [str(Path(sys.executable).parent / "pytest"), "-q", "-x", "--no-header", *arguments]
    environment = {**os.environ, "RPCTEST_SEED": str(seed), **environment}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT:.0f} s"
    if done.returncode not in (0, 1):
        sys.exit(f"pytest could not run the cases:\n{done.stdout}\n{done.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return done.returncode == 0, failed.group(1).split("::")[-1] if failed else ""


def name(place: str, library: str) -> str:
    """For people: the wait, and the functions of the engine from which it comes, the innermost first."""
    call, _, offsets = place.partition(" ")
    addresses = [hex(int(offset, 16) - 1) for offset in offsets.split("+") if offset]  # of the call, not behind it
    if not addresses:
        return f"{call} of an event that was never recorded"
    command = ["addr2line", "-C", "-f", "-i", "-e", library, *addresses]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[::2]
    functions = [re.sub(r"\(.*", "", line).removeprefix("torch_rpc_mpi::") for line in lines]
    return f"{call} in {' < '.join(dict.fromkeys(functions))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="tried for each wait")
    parser.add_argument("--only", default="", help="the waits with this text in their names")
    parser.add_argument("--all", action="store_true", help="also those that torch's futures make in the engine's calls")
    parser.add_argument("--list", action="store_true", help="find the waits and stop")
    options, arguments = parser.parse_known_args()
    arguments = arguments or CASES
    library = engine()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "waits")
        passed, failed = run_cases(arguments, 1, RPCTEST_WAITS_LOG=str(log))
        if not passed:
            sys.exit(f"the cases fail with all waits in place: {failed}")
        places = sorted(set(log.read_text().splitlines()))
    waits = {place: name(place, library) for place in places}
    waits = {place: wait for place, wait in waits.items() if options.only in wait}
    if not options.all:
        waits = {place: wait for place, wait in waits.items() if "c10::ivalue::Future" not in wait}
    print(f"{len(waits)} waits", flush=True)
    missed = []
    for place, wait in waits.items():
        if options.list:
            print(place, wait)
            continue
        for seed in range(1, options.seeds + 1):
            passed, failed = run_cases(arguments, seed, RPCTEST_LEAVE_OUT=place)
            if not passed:
                print(f"{wait}: found by {failed}, seed {seed}", flush=True)
                break
        else:
            missed.append(f"{wait} ({place})")
    for wait in missed:
        print(f"{wait}: NOT FOUND")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
