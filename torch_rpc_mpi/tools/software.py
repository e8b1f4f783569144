"""The parts that have to fit each other: torch, the extension, mpi4py, MPI and its launcher."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _extension, _launch, _mpi, _register, _rendezvous
from ..options import MPIRpcBackendOptions
from . import trial
from .facts import Fact, Resources, Status
from .place import Place
from .trial import Tell, Trial

_OPEN_LIMIT = 60.0  # seconds, for a library on a busy file server
_VERSION_LIMIT = 10.0  # seconds, for a launcher to say what it is
_REINSTALL = "reinstall it in this environment: `pip install --force-reinstall --no-deps torch_rpc_mpi`"


def package_facts(environ: Mapping[str, str] = os.environ) -> list[Fact]:
    """What Python alone can tell."""
    where = Path(__file__).resolve().parents[1]
    return [
        Fact("package", f"torch_rpc_mpi {__version__} in {where}"),
        Fact("python", f"{platform.python_version()} {sys.executable}"),
        Fact("system", platform.platform()) if sys.platform == "linux" else _other_system(),
        _torch_fact(),
        _backend_fact(environ),
        _options_fact(),
    ]


def _other_system() -> Fact:
    return Fact("system", platform.platform(), Status.PROBLEM, "torch_rpc_mpi runs on Linux")


def _torch_fact() -> Fact:
    version: Any = torch.version
    build = f"CUDA {version.cuda}" if version.cuda else f"ROCm {version.hip}" if version.hip else "CPU"
    value = f"{torch.__version__} (build for {build}) in {Path(torch.__file__).parent}"
    if torch.distributed.is_available() and torch.distributed.rpc.is_available():
        return Fact("torch", value)
    return Fact("torch", f"{value}, without torch.distributed.rpc", Status.PROBLEM, "install a build that has it")


def _backend_fact(environ: Mapping[str, str]) -> Fact:
    key = "backend"
    if not _register.is_registered():
        return Fact(key, '"MPI" is not registered with torch', Status.PROBLEM, "see the warning of `import torch`")
    if environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        remedy = "`import torch_rpc_mpi` in the program, or unset TORCH_DEVICE_BACKEND_AUTOLOAD"
        return Fact(key, '"MPI" is registered only once torch_rpc_mpi is imported', Status.NOTE, remedy)
    return Fact(key, '"MPI" is registered with torch')


def _options_fact() -> Fact:
    try:
        options = MPIRpcBackendOptions()
    except ValueError as error:
        return Fact("options", str(error), Status.PROBLEM)
    return Fact(
        "options",
        f"num_worker_threads={options.num_worker_threads} init_timeout={options.init_timeout:g} "
        f"rpc_timeout={options.rpc_timeout:g} init_method={options.init_method}",
    )


class Library:
    """What a child has found that loaded the extension and opened MPI, without MPI_Init."""

    def __init__(self, opened: Trial) -> None:
        self._trial, found = opened, opened.found
        self.text: str = found.get("library", "")  # of MPI_Get_library_version; empty: not known
        self.resources = Resources(*found.get("resources", ()))
        rank, size = found.get("place", (-1, -1))
        self.place: tuple[int, int] = (rank, size)  # as _launch.complete has it
        self.refusal: str = found.get("refusal", "")  # why MPI would not learn of the launcher's world

    @classmethod
    def open(cls) -> Library:
        return cls(trial.run(_open, _OPEN_LIMIT))

    def facts(self) -> list[Fact]:
        """One for each step, up to the one that failed."""
        found, failed = self._trial.found, self._trial.step if self._trial.failure else ""
        steps: dict[str, tuple[str, Callable[[], str]]] = {
            "extension": ("extension", lambda: f"built for torch {found['built_for']}"),
            "mpi4py": ("mpi4py", lambda: found["mpi4py"]),
            "library": ("mpi_library", lambda: f"{_mpi.short_name(self.text)}, {found['file']}"),
        }
        facts: list[Fact] = []
        for step, (key, text) in steps.items():
            if step == failed:
                return [*facts, self._failure(key)]
            facts.append(Fact(key, text()))
        return [*facts, Fact("mpi_abi", f"{found['abi']}, served by {found['shim']}")]

    def _failure(self, key: str) -> Fact:
        failure = self._trial.failure.partition(": ")[2] if ": " in self._trial.failure else self._trial.failure
        if self._trial.failure.startswith(("the process", "it did not")):
            said = f" and printed: {self._trial.said}" if self._trial.said else ""
            return Fact(key, f"loading it failed: {failure}{said}", Status.PROBLEM, _REINSTALL)
        return Fact(key, failure, Status.PROBLEM)


def _open(tell: Tell) -> None:
    tell({}, "extension")
    extension = _extension.load()
    resources = [extension.usable_cores(), extension.usable_memory(), *extension.cgroup_limits()]
    tell({"built_for": extension.__torch_version__, "resources": resources}, "mpi4py")
    mpi4py = _mpi.import_mpi4py()
    place = _launch.complete(-1, -1)
    if not _launch.through_store(*place):
        try:
            _launch.refuse()
        except RuntimeError as error:
            tell({"refusal": str(error)}, "")
    tell({"place": place, "mpi4py": f"{mpi4py.__version__} in {Path(mpi4py.__file__ or '').parent}"}, "library")
    loaded = _mpi.open_library()
    maps = Path("/proc/self/maps").read_text()
    # The shims and mpi4py's own library have such names, too.
    files = [file for file in re.findall(r"/\S+/lib\w*mpi\w*\.so[.\d]*", maps) if "mpi4py" not in file]
    shim = f"_mpi_shim_{loaded.abi}.so"
    text = loaded.runtime.library_version()
    tell({"library": text, "file": next(iter(files), "linked into mpi4py"), "abi": loaded.abi, "shim": shim}, "")


def launch_facts(place: Place, library: Library, environ: Mapping[str, str] = os.environ) -> list[Fact]:
    """What has started this process, and how it would come together with others."""
    if library.refusal:
        return [Fact("launcher", library.refusal, Status.PROBLEM)]
    size = "?" if place.size is None else place.size
    started = f"{place.launcher}, as rank {place.rank} of {size}" if place.launcher else "none has started this process"
    if place.launcher:
        return [Fact("launcher", started), *_world_facts(place, environ)]
    return [Fact("launcher", started), launcher_on_path(library.text, _mpirun_says()), *_world_facts(place, environ)]


def _world_facts(place: Place, environ: Mapping[str, str]) -> list[Fact]:
    address = ":".join(environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if place.by_store:
        url = _rendezvous.environments_url(place.rank, place.size or 1)
        return [
            Fact("world", f"{place.size} ranks, brought together through torch's store; no MPI launcher is needed"),
            Fact("init_method", f"mpi://, which is {url} here" + (f": {address}" if url == "env://" else "")),
        ]
    if place.launcher and not place.alone:
        return [
            Fact("world", "the launcher's; rank and size come from MPI"),
            Fact("init_method", "mpi://, which needs no address here"),
        ]
    remedy = (
        "`mpirun -n 4 python …`, torchrun, or rank and world_size, with MASTER_ADDR and MASTER_PORT or an init_method"
    )
    if "MASTER_ADDR" not in environ:
        address = "MASTER_ADDR is not set"
    return [
        Fact("world", "this process alone", Status.NOTE, remedy),
        Fact("init_method", f"mpi://, which is env:// without a launcher; {address}"),
    ]


def _mpirun_says() -> str | None:
    """What the mpirun on PATH says of its version; None if there is none."""
    path = shutil.which("mpirun") or shutil.which("mpiexec")
    if path is None:
        return None
    try:
        said = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_VERSION_LIMIT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}\n{type(error).__name__}: {error}"
    return f"{path}\n{said.stdout.decode(errors='replace')}"


_FAMILIES = {
    "Open MPI": re.compile(r"Open ?MPI|OpenRTE|prte", re.IGNORECASE),
    "Intel MPI": re.compile(r"Intel\(R\) MPI"),
    "MPICH": re.compile(r"MPICH|HYDRA|MVAPICH", re.IGNORECASE),
}


def _family(text: str) -> str:
    return next((name for name, pattern in _FAMILIES.items() if pattern.search(text)), "")


def launcher_on_path(library: str, says: str | None) -> Fact:
    """Whether the launcher on PATH is one of the MPI that mpi4py loads.

    Args:
        says: its path in a line, and what it says of its version; None: there is none.
    """
    key, mine = "mpirun", _family(library)
    if says is None:
        remedy = f"activate the environment or load the module that has {mine or 'the MPI'}'s, for worlds by mpirun"
        return Fact(key, "none on PATH", Status.NOTE, remedy)
    path, _, version = says.partition("\n")
    theirs = _family(version)
    value = f"{path}, of {theirs or 'an unknown MPI'}"
    # Both start processes by PMI-1.
    if not mine or not theirs or mine == theirs or {mine, theirs} == {"MPICH", "Intel MPI"}:
        return Fact(key, value, Status.OK if theirs else Status.NOTE)
    remedy = f"start with {mine}'s own: that of {theirs} would make as many worlds of one rank, or fail in MPI_Init"
    return Fact(key, f"{value}, but mpi4py has loaded {mine}", Status.WARNING, remedy)
