"""Registration with torch: the entry point, the backend enum, init_rpc, and life beside other backends."""

from __future__ import annotations

import enum
import inspect
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed
import torch.distributed.rpc as rpc
from torch.distributed.rpc import backend_registry
from unit_fakes import RunPython

import torch_rpc_mpi
from torch_rpc_mpi import MPIRpcBackendOptions, _register, backend

# A session of one rank over the backend under test, with every default torch has.
SESSION = """
import os, tempfile
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")

def session(**arguments):
    rpc.init_rpc("alone", rank=0, world_size=1, **arguments)
    assert rpc.rpc_sync("alone", max, args=(1, 2)) == 2
    agent = type(rpc.api._get_current_rpc_agent()).__name__
    rpc.shutdown()
    return agent

def options(kind=None):
    kind = kind or rpc.TensorPipeRpcBackendOptions
    return kind(init_method="file://" + tempfile.mktemp())
"""

# Another package's backend: TensorPipe under another name, with options of its own.
OTHER = """
from torch.distributed.rpc import backend_registry as registry

class OtherOptions(rpc.TensorPipeRpcBackendOptions):
    pass

def other_options(rpc_timeout, init_method, **kwargs):
    return OtherOptions(rpc_timeout=rpc_timeout, init_method=init_method, **kwargs)

def register_other():
    return registry.register_backend("OTHER", other_options, registry._tensorpipe_init_backend_handler)
"""


class TestEntryPoint:
    def test_import_torch_registers_and_loads_nothing_more(self, run_python: RunPython) -> None:
        run_python(
            """
import sys
import torch.distributed.rpc as rpc
assert rpc.BackendType.MPI is rpc.backend_registry.BackendType.MPI
assert repr(rpc.BackendType.MPI) == "BackendType.MPI"
for name in ("mpi4py", "torch_rpc_mpi._C", "torch_rpc_mpi.backend", "torch_rpc_mpi.options"):
    assert name not in sys.modules, name
""",
            installed=True,
        )

    def test_the_package_may_come_before_torch(self, run_python: RunPython) -> None:
        run_python(
            """
import torch_rpc_mpi
import torch.distributed.rpc as rpc
assert rpc.BackendType.MPI and torch_rpc_mpi._register.is_registered()
assert not hasattr(rpc.init_rpc.__wrapped__, "__wrapped__")
""",
            installed=True,
        )

    def test_importing_the_package_registers_where_autoload_is_off(self, run_python: RunPython) -> None:
        run_python(
            """
import torch.distributed.rpc as rpc
assert not hasattr(rpc.BackendType, "MPI")
import torch_rpc_mpi
assert rpc.BackendType.MPI
""",
            installed=True,
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
        )

    def test_a_second_import_of_the_package_changes_nothing(self, run_python: RunPython) -> None:
        run_python(
            """
import sys
import torch_rpc_mpi, torch.distributed.rpc as rpc
before = rpc.init_rpc, rpc.BackendType
for name in [name for name in sys.modules if name.startswith("torch_rpc_mpi")]:
    del sys.modules[name]
import torch_rpc_mpi
torch_rpc_mpi._register.autoload()
assert (rpc.init_rpc, rpc.BackendType) == before
assert torch_rpc_mpi._register.is_registered()
"""
        )

    def test_import_torch_survives_our_defects(self, run_python: RunPython, tmp_path: Path) -> None:
        # A torch that has no register_backend stands for whatever may go wrong.
        (tmp_path / "sitecustomize.py").write_text(
            """
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.distributed.rpc.backend_registry":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            def broken(*arguments):
                if arguments[0] == "MPI":
                    raise ZeroDivisionError
                return original(*arguments)
            original, module.register_backend = module.register_backend, broken
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
        )
        run_python(
            """
import torch.distributed.rpc as rpc
assert not hasattr(rpc.BackendType, "MPI")
assert not hasattr(rpc.init_rpc, "__wrapped__")
import torch_rpc_mpi
assert not torch_rpc_mpi.is_available()
""",
            installed=True,
            path=(tmp_path,),
        )


class TestAutoload:
    def test_logs_what_went_wrong(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(_register, "register", lambda: 1 / 0)
        with caplog.at_level(logging.WARNING, "torch_rpc_mpi"):
            _register.autoload()
        assert "could not register" in caplog.text
        assert "ZeroDivisionError" in caplog.text

    @pytest.mark.parametrize("module", [torch.distributed, rpc])
    def test_does_nothing_without_torchs_rpc(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        monkeypatch.setattr(module, "is_available", lambda: False)
        _register.autoload()
        assert not _register.is_registered()
        assert not torch_rpc_mpi.is_available()

    def test_leaves_a_name_that_another_package_took(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        value = backend_registry.BackendValue(lambda *_, **__: None, lambda **_: None)
        monkeypatch.setattr(backend_registry, "BackendType", enum.Enum("BackendType", {"MPI": value}))
        monkeypatch.setattr(rpc, "init_rpc", theirs := object())
        with caplog.at_level(logging.WARNING, "torch_rpc_mpi"):
            _register.autoload()
        assert 'another package has registered an RPC backend "MPI"' in caplog.text
        assert rpc.init_rpc is theirs
        assert not torch_rpc_mpi.is_available()


def test_options_are_found_on_the_package() -> None:
    assert "MPIRpcBackendOptions" in dir(torch_rpc_mpi)
    with pytest.raises(AttributeError, match="no attribute 'MPIOptions'"):
        _ = torch_rpc_mpi.MPIOptions


def test_is_available_needs_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rpc_mpi.importlib.util, "find_spec", lambda name: object())
    assert torch_rpc_mpi.is_available()
    monkeypatch.setattr(torch_rpc_mpi.importlib.util, "find_spec", lambda name: None if name == "mpi4py" else object())
    assert not torch_rpc_mpi.is_available()


class TestInitRpc:
    """Which calls are ours, and what then reaches torch's own init_rpc."""

    @pytest.fixture
    def torchs(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        calls = SimpleNamespace(original=[], prepared=[])

        def original(name, backend=None, rank=-1, world_size=None, rpc_backend_options=None):  # type: ignore[no-untyped-def]
            """torch's text"""
            calls.original.append((name, backend, rank, world_size, rpc_backend_options))

        def prepare(*arguments: Any) -> tuple[Any, ...]:
            calls.prepared.append(arguments)
            return ("prepared", 1, 4, "options")

        monkeypatch.setattr(backend, "prepare", prepare)
        calls.init_rpc = _register._wrap_init_rpc(original)
        return calls

    @pytest.mark.parametrize("named", ["MPI", lambda: backend_registry.BackendType["MPI"]])
    def test_ours_by_name_or_member(self, torchs: SimpleNamespace, named: Any) -> None:
        torchs.init_rpc("worker", backend=named if isinstance(named, str) else named())
        assert torchs.prepared == [("worker", -1, None, None)]
        assert torchs.original == [("prepared", backend_registry.BackendType["MPI"], 1, 4, "options")]

    def test_ours_by_options(self, torchs: SimpleNamespace) -> None:
        options = MPIRpcBackendOptions()
        torchs.init_rpc("worker", None, 1, 4, options)
        assert torchs.prepared == [("worker", 1, 4, options)]

    def test_ours_by_a_member_of_an_older_enum(self, torchs: SimpleNamespace) -> None:
        members = {member.name: member.value for member in backend_registry.BackendType}
        torchs.init_rpc("worker", enum.Enum("BackendType", members)["MPI"])  # type: ignore[misc]
        assert torchs.original[0][1] is backend_registry.BackendType["MPI"]

    @pytest.mark.parametrize("other", [None, "TENSORPIPE", "gloo", 3])
    def test_anything_else_reaches_torch_unchanged(self, torchs: SimpleNamespace, other: Any) -> None:
        options = object()
        torchs.init_rpc("worker", other, 2, 3, options)
        assert torchs.prepared == []
        assert torchs.original == [("worker", other, 2, 3, options)]

    def test_looks_like_torchs(self) -> None:
        ours = rpc.init_rpc
        assert inspect.signature(ours) == inspect.signature(ours.__wrapped__)
        assert ours.__doc__ == ours.__wrapped__.__doc__
        assert ours.__module__ == "torch.distributed.rpc"
        with pytest.raises(TypeError, match=r"init_rpc\(\) missing 1 required positional argument: 'name'"):
            ours()


class TestBesideTensorPipe:
    def test_its_programs_run_as_before(self, run_python: RunPython) -> None:
        run_python(
            "import torch.distributed.rpc as rpc\n"
            + SESSION
            + """
assert rpc.BackendType.MPI
assert session() == "TensorPipeAgent"
assert session(rpc_backend_options=options()) == "TensorPipeAgent"
assert session(backend=rpc.BackendType.TENSORPIPE) == "TensorPipeAgent"
assert session(backend=rpc.BackendType.TENSORPIPE, rpc_backend_options=options()) == "TensorPipeAgent"
import sys
assert "mpi4py" not in sys.modules and "torch_rpc_mpi._C" not in sys.modules
""",
            installed=True,
        )

    def test_inference_from_its_options_ignores_our_environment(self, run_python: RunPython) -> None:
        # torch asks every backend for default options on the way, ours first.
        run_python(
            "import torch.distributed.rpc as rpc\n"
            + SESSION
            + 'assert session(rpc_backend_options=options()) == "TensorPipeAgent"\n',
            installed=True,
            TORCH_RPC_MPI_EAGER_LIMIT="nonsense",
        )

    @pytest.mark.parametrize("name", ["TENSORPIPE", "gloo", ""])
    def test_other_strings_stay_torchs_type_error(self, name: str) -> None:
        with pytest.raises(TypeError, match=r"^Argument backend must be a member of BackendType$"):
            rpc.init_rpc("worker", backend=name, rank=0, world_size=1)

    def test_foreign_options_stay_torchs_type_errors(self) -> None:
        with pytest.raises(TypeError, match="Argument rpc_backend_options must be an instance of RpcBackendOptions"):
            rpc.init_rpc("worker", rank=0, world_size=1, rpc_backend_options={})

        class Bare(torch._C._distributed_rpc.RpcBackendOptions):  # type: ignore[misc]
            pass

        with pytest.raises(TypeError, match="Could not infer backend for options"):
            rpc.init_rpc("worker", rank=0, world_size=1, rpc_backend_options=Bare())


class TestBesideAnotherPackage:
    def test_registered_before_ours(self, run_python: RunPython) -> None:
        run_python(
            "import torch.distributed.rpc as rpc\n"
            + SESSION
            + OTHER
            + """
other = register_other()
import torch_rpc_mpi
assert rpc.BackendType.MPI and rpc.BackendType.OTHER
assert session(backend=other) == "TensorPipeAgent"
assert session(backend=rpc.BackendType.OTHER, rpc_backend_options=options(OtherOptions)) == "TensorPipeAgent"
assert session(rpc_backend_options=options()) == session() == "TensorPipeAgent"
""",
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
        )

    def test_registered_after_ours(self, run_python: RunPython) -> None:
        run_python(
            "import torch.distributed.rpc as rpc\n"
            + SESSION
            + OTHER
            + """
mpi, tensorpipe = rpc.BackendType.MPI, rpc.BackendType.TENSORPIPE
other = register_other()
assert session() == "TensorPipeAgent"
assert rpc.BackendType is registry.BackendType
assert session(backend=tensorpipe) == session(backend=other) == "TensorPipeAgent"
import torch_rpc_mpi.backend
asked = []
def prepare(*arguments):
    asked.append(arguments)
    raise KeyError
torch_rpc_mpi.backend.prepare = prepare
for named in (mpi, rpc.BackendType.MPI, "MPI"):
    try:
        rpc.init_rpc("alone", backend=named)
    except KeyError:
        pass
assert len(asked) == 3
""",
            installed=True,
        )


class TestOptionHandler:
    def test_torchs_defaults_need_no_address(self) -> None:
        made = backend_registry.construct_rpc_backend_options(backend_registry.BackendType["MPI"])
        assert isinstance(made, MPIRpcBackendOptions)
        assert (made.init_method, made.rpc_timeout) == ("mpi://", 60.0)

    def test_passes_arguments_on(self) -> None:
        made = backend_registry.construct_rpc_backend_options(
            backend_registry.BackendType["MPI"], rpc_timeout=5, init_method="file:///x", num_worker_threads=2
        )
        assert (made.init_method, made.rpc_timeout, made.num_worker_threads) == ("file:///x", 5.0, 2)

    def test_refuses_unknown_ones(self) -> None:
        with pytest.raises(TypeError, match="no option '_transports'"):
            backend_registry.construct_rpc_backend_options(backend_registry.BackendType["MPI"], _transports=["uv"])

    def test_keeps_an_error_of_the_environment_for_init_rpc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_RPC_MPI_BULK_CHUNK", "much")
        made = backend_registry.construct_rpc_backend_options(backend_registry.BackendType["MPI"])
        with pytest.raises(ValueError, match="TORCH_RPC_MPI_BULK_CHUNK='much'"):
            rpc.init_rpc("worker", backend="MPI", rpc_backend_options=made)


class TestRendezvous:
    def test_under_a_launcher_gives_a_store_without_any_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        monkeypatch.setenv("PMI_RANK", "1")
        monkeypatch.setenv("PMI_SIZE", "4")
        store, rank, world_size = next(torch.distributed.rendezvous("mpi://", rank=1, world_size=4))
        assert isinstance(store, torch.distributed.HashStore)
        assert (rank, world_size) == (1, 4)

    def test_without_a_launcher_says_what_is_missing(self, monkeypatch: pytest.MonkeyPatch, no_launcher: None) -> None:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        with pytest.raises(RuntimeError, match=r"asked for 4 ranks.*no MPI launcher.*MASTER_ADDR.*`mpirun -n 4 python"):
            next(torch.distributed.rendezvous("mpi://", rank=1, world_size=4))

    def test_refuses_process_groups(self) -> None:
        # Their ranks would wait for each other in stores that only they themselves see.
        with pytest.raises(ValueError, match=r'init_method="mpi://" serves .*init_rpc.* only'):
            torch.distributed.init_process_group("gloo", init_method="mpi://", rank=0, world_size=2)
