"""Finds the torch that the extension is to be built against, without importing it.

pip builds in an isolated environment that hides the packages of the environment it installs into, yet it runs that
environment's interpreter there. So torch is looked for on ``sys.path`` first (a build without isolation, or a torch put
into the build environment because there was none) and then where the interpreter's own packages are.
"""

import importlib.metadata
import os
import site
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import NamedTuple

OLDEST = (2, 6)

# What to install where there is no torch. One series, not a range: newer ones are untested until this line says
# otherwise. Someone who builds for another series sets the variable.
WHEN_NONE = os.environ.get("TORCH_RPC_MPI_BUILD_TORCH", "torch==2.13.*")


class Torch(NamedTuple):
    """An installed torch: the directory of its package, and its version without the local part ("+cpu")."""

    directory: Path
    version: str

    @property
    def minor(self) -> str:
        """The release series, such as "2.13": the extension fits one only."""
        return ".".join(self.version.split(".")[:2])


def version_label(torch: Torch | None) -> str:
    """What the version of a wheel says of its torch, "+torch2.13" say, if $TORCH_RPC_MPI_VERSION_LABEL asks for it.

    Wheels for several torch series have the same name and tags otherwise, and could not lie in one place.
    """
    asked = os.environ.get("TORCH_RPC_MPI_VERSION_LABEL", "")
    if asked not in ("", "0", "1"):
        warnings.warn(f"TORCH_RPC_MPI_VERSION_LABEL={asked!r} has no meaning: 1 asks for a label", stacklevel=2)
    return f"+torch{torch.minor}" if torch and asked == "1" else ""


def _sees_base_packages() -> bool:
    if sys.prefix == sys.base_prefix:
        return True
    config = Path(sys.prefix, "pyvenv.cfg")
    lines = config.read_text().lower().splitlines() if config.is_file() else []
    return any(line.replace(" ", "") == "include-system-site-packages=true" for line in lines)


def package_directories() -> list[str]:
    """Where the packages of the environment that is built for may lie."""
    directories = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if _sees_base_packages():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        directories += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
        # site knows a distribution's own places (dist-packages); pip hides the user's only during the build.
        directories += [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]
    return [directory for directory in dict.fromkeys(directories) if os.path.isdir(directory)]


def find_torch() -> Torch | None:
    """Return the torch to build against, or None when there is none; refuse one that is too old."""
    for distribution in importlib.metadata.distributions(name="torch", path=package_directories()):
        directory = Path(str(distribution.locate_file("torch")))
        if not (directory / "share" / "cmake").is_dir():
            continue
        version = distribution.version.partition("+")[0]
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise SystemExit(f"torch {version} in {directory} is too old: torch_rpc_mpi needs torch >= {oldest}")
        return Torch(directory, version)
    return None


if __name__ == "__main__":
    if "--requirement" in sys.argv:
        print(WHEN_NONE)
    elif found := find_torch():
        print(found.directory)
    else:
        raise SystemExit(f"{sys.executable} has no torch: install it first (pip install '{WHEN_NONE}')")
