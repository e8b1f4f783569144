"""A build_ext that has CMake build the extension and the MPI shims."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_check import check_extension, compiler_of
from build_length import announcement
from setuptools.command.build_ext import build_ext
from torch_location import find_torch, package_directories

PACKAGE = "torch_rpc_mpi"
_ROOT = Path(__file__).resolve().parent.parent
_LIBRARIES = [
    f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
    *(f"_mpi_shim_{abi}.so" for abi in ("mpich", "openmpi", "standard")),
]


class CMakeBuild(build_ext):
    """Builds everything at once, for the single extension that setup() names."""

    def build_extension(self, ext) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit("torch is not installed, and a build without isolation needs it: pip install torch")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("cmake is not installed, and a build without isolation needs it: pip install cmake ninja")
        build_directory = Path(self.build_temp).resolve()
        # An earlier build's cache names the tools of its build environment, which pip has deleted. The objects stay.
        (build_directory / "CMakeCache.txt").unlink(missing_ok=True)
        settings = {
            "Python_EXECUTABLE": sys.executable,
            "TORCH_RPC_MPI_OUTPUT_DIR": (Path(self.build_lib) / PACKAGE).resolve(),
            "TORCH_RPC_MPI_TORCH_DIR": torch.directory,
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run([cmake, "-S", _ROOT, "-B", build_directory, "-G", "Ninja", *definitions], check=True)
        print(announcement(build_directory), flush=True)
        subprocess.run([cmake, "--build", build_directory], check=True)
        check_extension(
            settings["TORCH_RPC_MPI_OUTPUT_DIR"] / _LIBRARIES[0],
            torch.directory,
            package_directories(),
            compiler_of(build_directory),
        )

    def get_output_mapping(self) -> dict[str, str]:
        """Built file to its place in the source tree, for an editable install."""
        if not self.inplace:
            return {}
        return {str(Path(self.build_lib, PACKAGE, name)): str(Path(PACKAGE, name)) for name in _LIBRARIES}

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, PACKAGE, name)) for name in _LIBRARIES]

    def copy_extensions_to_source(self) -> None:
        for built, in_source in self.get_output_mapping().items():
            self.copy_file(built, str(_ROOT / in_source))
