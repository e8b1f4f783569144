import os

from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyTorchRpcMpi(PythonPackage):
    """An MPI backend for torch.distributed.rpc."""

    # No site publishes the sources yet: `make sdist` makes the archive, and Spack takes it from the directory that it
    # is called in, as it does for other packages that have to be fetched by hand.
    manual_download = True

    license("BSD-3-Clause")

    version("0.1.0")

    def url_for_version(self, version):
        return f"file://{os.getcwd()}/torch_rpc_mpi-{version}.tar.gz"

    depends_on("cxx", type="build")
    depends_on("c", type="build")
    depends_on("cmake@3.25:", type="build")
    depends_on("ninja", type="build")
    depends_on("py-setuptools@77:", type="build")

    depends_on("python@3.10:", type=("build", "run"))
    # The extension uses torch's C++ classes, so it is built anew for each torch.
    depends_on("py-torch@2.6:2.14+distributed+tensorpipe", type=("build", "link", "run"))
    # Which brings the MPI; none is needed for the build, and any of the three ABIs will do.
    depends_on("py-mpi4py@4:", type="run")
    depends_on("py-cloudpickle@2:", type="run")

    conflicts("%gcc@:11", msg="C++20 is needed, tried with GCC 12")
    conflicts("platform=darwin", msg="Linux only")

    import_modules = ["torch_rpc_mpi", "torch_rpc_mpi._C", "torch_rpc_mpi.tools"]

    @run_after("install")
    @on_package_attributes(run_tests=True)
    def looks_at_the_result(self):
        python("-m", "torch_rpc_mpi.tools", "doctor", "--no-session")
