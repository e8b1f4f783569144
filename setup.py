"""What pyproject.toml cannot say: the extension, and the torch series that the wheel is tied to."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "_build_backend"))
from cmake_build import CMakeBuild
from torch_location import OLDEST, find_torch, version_label

torch = find_torch()
# torch's classes change between minor releases, so a binary fits one series. Without torch this is a source
# distribution, which fits all that are supported.
torch_requirement = f"torch=={torch.minor}.*" if torch else f"torch>={'.'.join(map(str, OLDEST))}"

setup(
    install_requires=[torch_requirement, "mpi4py>=4.0", "cloudpickle>=2.0"],
    ext_modules=[Extension("torch_rpc_mpi._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    options={"egg_info": {"tag_build": version_label(torch)}},
)
