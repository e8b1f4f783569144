"""Says how long the build will take; ninja's own lines, [done/all], then tell how far it is."""

import json
import math
import os
from pathlib import Path

# Of one core; torch's headers are most of it.
_SECONDS_A_FILE = 10


def announcement(build_directory: Path) -> str:
    """A line about the length of the build that CMake has configured there, if nothing is compiled yet."""
    files = len(json.loads((build_directory / "compile_commands.json").read_text()))
    at_a_time = int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or 2) or 2  # see CMakeLists.txt
    cores = min(at_a_time, len(os.sched_getaffinity(0)))
    minutes = math.ceil(files * _SECONDS_A_FILE / cores / 60)
    return (
        f"torch_rpc_mpi: {files} files to compile, about {minutes} minute{'s' * (minutes != 1)} on "
        f"{cores} core{'s' * (cores != 1)}; less if some are compiled already, or with ccache"
    )
