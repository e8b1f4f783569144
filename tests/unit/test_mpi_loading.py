"""Finding MPI: what goes wrong on real machines, each as an error with its remedy. Against a fake mpi4py."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import unit_fakes

import torch_rpc_mpi
from torch_rpc_mpi import _extension, _mpi

pytestmark = pytest.mark.usefixtures("fresh_mpi", "no_launcher")


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = unit_fakes.make_extension(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_rpc_mpi._C", made)
    monkeypatch.setattr(torch_rpc_mpi, "_C", made, raising=False)
    monkeypatch.setattr(unit_fakes.Watchdog, "made", [])
    return made


@pytest.fixture
def mpi4py(extension: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a fake mpi4py, as ``unit_fakes.write_mpi4py`` does, that ``import`` finds."""

    def make(**settings: Any) -> None:
        unit_fakes.write_mpi4py(tmp_path / "site", **settings)
        monkeypatch.syspath_prepend(tmp_path / "site")

    return make


class TestFinalisingAtExit:
    """By this package and not by mpi4py, which does so in forked children as well."""

    @pytest.fixture
    def registered(self, extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
        """Of each call of finalize_at_exit its arguments; MPI is initialised if ``extension.initialized`` is set."""
        calls: list[tuple[int, ...]] = []

        def ask(flag: Any) -> int:
            flag[0] = getattr(extension, "initialized", 0)
            return 0

        query = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))(ask)
        library = SimpleNamespace(MPI_Initialized=query, MPI_Finalized=query, MPI_Finalize=query)
        extension.finalize_at_exit = lambda *functions: calls.append(functions) or True  # type: ignore[func-returns-value]
        monkeypatch.setattr(_mpi, "_library_of_mpi4py", lambda: library)
        return calls

    def test_takes_the_place_of_mpi4pys(self, mpi4py: Callable[..., None], registered: list[tuple[int, ...]]) -> None:
        mpi4py()
        _mpi.load(60)
        assert [len(functions) for functions in registered] == [3]
        assert sys.modules["mpi4py"].rc.finalize is False

    @pytest.mark.parametrize("told", [False, 0, "no"])
    def test_is_left_to_a_program_that_wants_to(
        self, told: object, mpi4py: Callable[..., None], registered: list[tuple[int, ...]]
    ) -> None:
        mpi4py()
        importlib.import_module("mpi4py").rc.finalize = told
        _mpi.load(60)
        assert registered == []
        assert sys.modules["mpi4py"].rc.finalize is told

    def test_is_left_to_what_the_environment_tells_mpi4py(
        self, mpi4py: Callable[..., None], registered: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MPI4PY_RC_FINALIZE", "1")
        mpi4py()
        _mpi.load(60)
        assert registered == []

    def test_is_left_to_who_has_initialised_mpi(
        self, extension: ModuleType, mpi4py: Callable[..., None], registered: list[tuple[int, ...]]
    ) -> None:
        extension.initialized = 1  # type: ignore[attr-defined]
        mpi4py()
        _mpi.load(60)
        assert registered == []


class TestLoad:
    def test_finds_the_shim_that_fits(self, mpi4py: Callable[..., None], tmp_path: Path) -> None:
        mpi4py()
        loaded = _mpi.load(60)
        assert loaded.abi == "mpich"
        assert loaded.runtime.shim_path == str(tmp_path / "_mpi_shim_mpich.so")  # type: ignore[attr-defined]
        assert loaded.runtime.mpi_extension_path == loaded.MPI.__file__  # type: ignore[attr-defined]
        assert loaded.library() == "Fake MPI 1.0"

    def test_happens_once(self, mpi4py: Callable[..., None]) -> None:
        mpi4py()
        assert _mpi.load(60) is _mpi.load(60)
        assert len(unit_fakes.Watchdog.made) == 1

    def test_asks_for_all_threads(self, mpi4py: Callable[..., None]) -> None:
        mpi4py()
        assert _mpi.load(60).MPI.thread_level_at_import == "multiple"

    def test_leaves_an_mpi_that_is_there_alone(self, mpi4py: Callable[..., None]) -> None:
        mpi4py()
        import mpi4py.MPI as present

        assert _mpi.load(60).MPI is present
        assert sys.modules["mpi4py"].rc.thread_level == "untouched"
        assert unit_fakes.Watchdog.made == []

    def test_watches_over_mpi_init(self, mpi4py: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PMI_RANK", "2")
        monkeypatch.setenv("PMI_SIZE", "4")
        mpi4py()
        _mpi.load(60)
        (watchdog,) = unit_fakes.Watchdog.made
        assert not watchdog.imported_before
        assert watchdog.cancelled
        assert watchdog.what.startswith(f"MPI_Init of rank 2 of 4 (pid {os.getpid()} on ")
        assert (watchdog.warn_after, watchdog.abort_after) == (10.0, 60)

    @pytest.mark.parametrize(("init_timeout", "warn_after"), [(4, 2), (0, 10)])
    def test_warns_in_time(self, mpi4py: Callable[..., None], init_timeout: float, warn_after: float) -> None:
        mpi4py()
        _mpi.load(init_timeout)
        assert unit_fakes.Watchdog.made[0].warn_after == warn_after
        assert unit_fakes.Watchdog.made[0].abort_after == init_timeout


class TestNothingToLoad:
    def test_no_mpi4py(self, extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mpi4py", None)
        with pytest.raises(ImportError, match=r'needs mpi4py.* lacks.* `pip install "torch_rpc_mpi\[mpich\]"`'):
            _mpi.load(60)

    def test_old_mpi4py(self, mpi4py: Callable[..., None]) -> None:
        mpi4py(version="3.1.6")
        with pytest.raises(ImportError, match=r"needs mpi4py 4.0 or newer, but this is 3.1.6.*--upgrade"):
            _mpi.load(60)

    @pytest.mark.parametrize("version", ["4.0.0", "4.2.0.dev0", "10.0"])
    def test_new_enough_mpi4py(self, mpi4py: Callable[..., None], version: str) -> None:
        mpi4py(version=version)
        assert _mpi.load(60)

    def test_no_libmpi(self, mpi4py: Callable[..., None]) -> None:
        mpi4py(prologue="raise RuntimeError('cannot load MPI library\\nlibmpi.so: cannot open shared object file')")
        with pytest.raises(RuntimeError, match=r"(?s)found no MPI library.*libmpi.so: cannot open.*module load"):
            _mpi.load(60)
        assert unit_fakes.Watchdog.made[0].cancelled

    def test_abi_that_mpi4py_does_not_know(self, mpi4py: Callable[..., None]) -> None:
        mpi4py(
            prologue="""
            import warnings
            warnings.warn("unsupported MPI ABI 'mpiabi'", RuntimeWarning)
            raise ImportError("cannot import name 'MPI'")
            """
        )
        with pytest.raises(RuntimeError, match="cannot import name 'MPI'; unsupported MPI ABI 'mpiabi'"):
            _mpi.load(60)

    def test_other_warnings_of_mpi4py_pass(self, mpi4py: Callable[..., None]) -> None:
        mpi4py(prologue="import warnings\nwarnings.warn('a word from MPI', RuntimeWarning)\n")
        with pytest.warns(RuntimeWarning, match="a word from MPI"):
            _mpi.load(60)

    def test_no_shim(self, mpi4py: Callable[..., None], tmp_path: Path) -> None:
        mpi4py()
        (tmp_path / "_mpi_shim_mpich.so").unlink()
        with pytest.raises(ImportError, match=r"shim for the mpich ABI is missing .*Reinstall torch_rpc_mpi"):
            _mpi.load(60)


class TestExtension:
    def test_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(_extension, "__file__", str(tmp_path / "torch_rpc_mpi" / "_extension.py"))
        monkeypatch.setitem(sys.modules, "torch_rpc_mpi._C", None)
        with pytest.raises(ImportError, match=r"does not load into torch .*Reinstall"):
            _extension.load()

    def test_missing_in_the_sources(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "torch_rpc_mpi").mkdir()
        (tmp_path / "pyproject.toml").touch()
        monkeypatch.setattr(_extension, "__file__", str(tmp_path / "torch_rpc_mpi" / "_extension.py"))
        monkeypatch.setitem(sys.modules, "torch_rpc_mpi._C", None)
        with pytest.raises(ImportError, match=r"imported the sources of torch_rpc_mpi in .*another directory"):
            _extension.load()

    def test_of_another_torch(self, extension: ModuleType) -> None:
        extension.__torch_version__ = "2.6.0"  # type: ignore[attr-defined]
        with pytest.raises(ImportError, match=r"was built for torch 2\.6\.0, but this is torch .*Reinstall"):
            _extension.load()

    def test_that_does_not_load_names_the_torch_that_it_was_built_for(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        built = tmp_path / "_C.so"
        built.write_bytes(b"\x7fELF\0torch_rpc_mpi was built for torch 2.6.0\0")
        monkeypatch.setattr(_extension, "__file__", str(tmp_path / "torch_rpc_mpi" / "_extension.py"))
        monkeypatch.setitem(sys.modules, "torch_rpc_mpi._C", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(built)))
        with pytest.raises(
            ImportError, match=r"does not load into torch 2.*It was built for torch 2\.6\.0\. Reinstall"
        ):
            _extension.load()

    def test_says_which_torch_it_was_built_for(self) -> None:
        assert _extension._built_for() == _extension.load().__torch_version__

    def test_of_the_same_torch_series(self, extension: ModuleType) -> None:
        extension.__torch_version__ = ".".join(torch.__version__.split(".")[:2]) + ".99"  # type: ignore[attr-defined]
        assert _extension.load() is extension


class TestAbi:
    @pytest.mark.parametrize(
        ("abi_version", "handle_size", "abi"),
        [
            (None, 4, "mpich"),
            (None, 8, "openmpi"),
            ((-1, -1), 4, "mpich"),
            ((-1, -1), 8, "openmpi"),
            ((1, 0), 8, "standard"),
        ],
    )
    def test_is_told_by_version_and_handle_size(
        self, abi_version: tuple[int, int] | None, handle_size: int, abi: str
    ) -> None:
        mpi = SimpleNamespace(Comm=object, _sizeof=lambda what: handle_size)
        if abi_version:
            mpi.Get_abi_version = lambda: abi_version
        assert _mpi.detect_abi(mpi) == abi

    def test_unknown(self) -> None:
        mpi = SimpleNamespace(Comm=object, _sizeof=lambda what: 2, Get_library_version=lambda: "Odd MPI")
        with pytest.raises(RuntimeError, match=r"Odd MPI.*handles of 2 bytes"):
            _mpi.detect_abi(mpi)

    @pytest.mark.parametrize(
        ("version", "nodes", "trusted"),
        [
            ("MPICH Version: 5.0.2\nMPICH Device: ch4:ucx ofi", 2, False),
            ("MPICH Version: 5.0.2\nMPICH Device: ch4:ucx ofi", 1, True),
            ("MPICH Version: 5.0.2\nMPICH Device: ch4:ofi ucx", 2, False),
            ("MPICH Version: 4.0.2\nMPICH Device: ch4:ofi", 2, True),
            ("Open MPI v5.0.11", 2, True),
        ],
    )
    def test_decides_about_receives_from_any_source(self, version: str, nodes: int, trusted: bool) -> None:
        runtime: Any = SimpleNamespace(library_version=lambda: version)
        assert _mpi.LoadedMPI(None, runtime, "mpich", 1).takes_any_source(nodes) is trusted

    @pytest.mark.parametrize(("enabled", "trusted"), [("1", False), ("0", True)])
    def test_decides_so_with_fault_tolerance(
        self, monkeypatch: pytest.MonkeyPatch, enabled: str, trusted: bool
    ) -> None:
        monkeypatch.setenv("OMPI_MCA_mpi_ft_enable", enabled)
        runtime: Any = SimpleNamespace(library_version=lambda: "Open MPI v5.0.11")
        assert _mpi.LoadedMPI(None, runtime, "openmpi", 1).takes_any_source(1) is trusted

    @pytest.mark.parametrize(
        ("device_type", "hip", "queries", "taken"),
        [
            ("cuda", None, {"cuda": 1}, True),
            ("cuda", None, {"cuda": 0}, False),
            ("cuda", None, {"hip": 1}, False),
            ("cuda", None, {}, False),
            ("cuda", "6.2", {"cuda": 1}, False),
            ("cuda", "6.2", {"rocm": 1}, True),
            ("cuda", "6.2", {"hip": 1, "cuda": 0}, True),
            ("xpu", None, {"cuda": 1}, False),
            ("cuda", None, {0: 1}, True),
            ("cuda", None, {2: 1}, False),
            ("cuda", "6.2", {2: 1}, True),
            ("cuda", None, {0: 1, "cuda": 0}, False),
        ],
    )
    def test_asks_mpi_whether_it_takes_device_memory(
        self, monkeypatch: pytest.MonkeyPatch, device_type: str, hip: str | None, queries: dict[Any, int], taken: bool
    ) -> None:
        """Here a library that claims it; one for real could not be had. Numbers: of what it has one function for."""

        def query(kind: int, supported: Any) -> int:
            supported._obj.value = queries.get(kind, 0)
            return 0

        functions: dict[str, Any] = {
            f"MPIX_Query_{kind}_support": lambda said=said: said for kind, said in queries.items()
        }
        if any(isinstance(kind, int) for kind in queries):
            functions["MPIX_GPU_query_support"] = query
        monkeypatch.setattr(ctypes, "CDLL", {"mpi": SimpleNamespace(**functions)}.__getitem__)
        monkeypatch.setattr(torch.version, "hip", hip)
        module, runtime = SimpleNamespace(__file__="mpi"), cast(Any, None)
        assert _mpi.LoadedMPI(module, runtime, "mpich", 1).takes_memory_of(device_type) is taken

    @pytest.mark.parametrize(("abi", "handle"), [("mpich", 11), ("openmpi", 11), ("standard", 22)])
    def test_decides_the_handle(self, abi: str, handle: int) -> None:
        comm: Any = SimpleNamespace(py2f=lambda: 11, handle=22)
        runtime: Any = None
        assert _mpi.LoadedMPI(None, runtime, abi, 0).handle(comm) == handle


class TestState:
    def test_finalised(self, mpi4py: Callable[..., None]) -> None:
        mpi4py(finalized=True)
        with pytest.raises(RuntimeError, match=r"MPI was finalised.*before MPI.Finalize\(\)"):
            _mpi.load(60)

    def test_finalised_between_sessions(self, mpi4py: Callable[..., None]) -> None:
        mpi4py()
        _mpi.load(60).MPI.finalized = True
        with pytest.raises(RuntimeError, match="MPI was finalised"):
            _mpi.load(60)

    def test_not_initialised(self, mpi4py: Callable[..., None]) -> None:
        mpi4py(initialized=False)
        with pytest.raises(RuntimeError, match=r"rc.initialize = False.*MPI.Init_thread\(MPI.THREAD_MULTIPLE\)"):
            _mpi.load(60)

    def test_two_libraries(self, mpi4py: Callable[..., None], extension: ModuleType) -> None:
        mpi4py()
        extension.MPIRuntime.is_initialized = False
        with pytest.raises(RuntimeError, match="two MPI libraries are loaded"):
            _mpi.load(60)

    @pytest.mark.parametrize(("level", "name"), [(0, "MPI_THREAD_SINGLE"), (1, "MPI_THREAD_FUNNELED")])
    def test_too_few_threads(self, mpi4py: Callable[..., None], extension: ModuleType, level: int, name: str) -> None:
        mpi4py()
        extension.MPIRuntime.level = level
        with pytest.raises(RuntimeError, match=rf"initialised with {name}.*MPI_Init_thread with MPI_THREAD_MULTIPLE"):
            _mpi.load(60)

    def test_serialised_threads_work_with_a_warning(self, mpi4py: Callable[..., None], extension: ModuleType) -> None:
        mpi4py()
        extension.MPIRuntime.level = 2
        with pytest.warns(RuntimeWarning, match="MPI_THREAD_SERIALIZED.* must not call MPI in any other way"):
            assert _mpi.load(60)

    def test_forked_child(self, mpi4py: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        mpi4py()
        _mpi.load(60)
        child = os.getpid() + 1
        monkeypatch.setattr(os, "getpid", lambda: child)
        with pytest.raises(RuntimeError, match=r'was forked from pid .*"spawn" or "forkserver"'):
            _mpi.load(60)
