"""``python -m torch_rpc_mpi`` runs a program as ``python`` does."""

from __future__ import annotations

import json
import os
import py_compile
import re
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit_fakes import RunPython

from torch_rpc_mpi import _exit, _launchers, _mpi, _program, _torchrun

# What a program can see of how it was started, as one line of JSON; its exit shows that __main__ is still there.
PROGRAM = """
import atexit, json, sys
import __main__

class Local:
    pass

def report():
    spec = __main__.__spec__
    print(json.dumps({
        "is main": sys.modules["__main__"].__dict__ is globals(),
        "name": (__name__, Local.__module__),
        "file": globals().get("__file__"),
        "package": __package__,
        "spec": spec and (spec.name, spec.origin),
        "loader": getattr(__loader__, "__name__", type(__loader__).__name__),
        "argv": sys.argv,
        "path": sys.path[0],
        "doc": __doc__,
    }))

report()
atexit.register(lambda: print(__main__.Local.__module__, __main__.__dict__ is report.__globals__))
"""

AT_EXIT = "__main__ True"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where there is a program of every kind."""
    (tmp_path / "prog.py").write_text('"""A program."""\n' + PROGRAM)
    (tmp_path / "package" / "inner").mkdir(parents=True)
    for package in (tmp_path / "package", tmp_path / "package" / "inner"):
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(PROGRAM)
    py_compile.compile(str(tmp_path / "prog.py"), str(tmp_path / "compiled.pyc"))
    (tmp_path / "link.py").symlink_to(tmp_path / "package" / "inner" / "__main__.py")
    with zipfile.ZipFile(tmp_path / "zipped", "w") as file:
        file.writestr("__main__.py", PROGRAM)
    return tmp_path


def as_python(place: Path, *arguments: str, stdin: str = "") -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, *arguments], cwd=place, input=stdin, capture_output=True, text=True, timeout=60, check=True
    )
    report, at_exit = child.stdout.splitlines()
    assert at_exit == AT_EXIT
    return json.loads(report)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["prog.py", "--option", "-x"], ""),
        (["link.py"], ""),
        (["compiled.pyc", "a"], ""),
        (["package/inner", "a"], ""),
        (["zipped", "a"], ""),
        (["-m", "prog", "-c"], ""),
        (["-mpackage"], ""),
        (["-m", "package.inner", "a"], ""),
        (["-c", PROGRAM, "-m"], ""),
        (["-", "a"], PROGRAM),
    ],
    ids=lambda value: " ".join(value).split("\n")[0] if isinstance(value, list) else "",
)
def test_sees_what_python_gives(
    run_forked_with_fakes: RunPython, place: Path, arguments: list[str], stdin: str
) -> None:
    # In a process that has torch already, and what `python -m` has: the current directory first in its path.
    ours = run_forked_with_fakes(
        f"import io, os, sys; sys.path.insert(0, os.getcwd()); sys.stdin = io.StringIO({stdin!r})\n",
        f"from torch_rpc_mpi import _program; _program.main({arguments!r})\n",
    )
    report, at_exit = ours.splitlines()
    pythons = as_python(place, *arguments, stdin=stdin)
    if arguments[0] == "-":
        pythons["file"] = None  # "<stdin>", which children that are spawned would try to open
    assert json.loads(report) == pythons
    assert at_exit == AT_EXIT


def test_is_found_by_children_that_are_spawned(run_python: RunPython, tmp_path: Path) -> None:
    """The real command. The child imports the program, which is backend "MPI" to it as well."""
    (tmp_path / "prog.py").write_text(
        textwrap.dedent(
            """
            import multiprocessing, os, sys

            class Thing:
                pass

            def child(queue, thing):
                import torch.distributed.rpc as rpc
                queue.put((type(thing) is Thing, Thing.__module__, os.environ["TORCH_RPC_MPI_DROP_IN"]))

            if __name__ == "__main__":
                context = multiprocessing.get_context("spawn")
                queue = context.Queue()
                process = context.Process(target=child, args=(queue, Thing()))
                process.start()
                print(*queue.get())
                process.join()
                sys.exit(process.exitcode)
            """
        )
    )
    printed = run_python(
        "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'torch_rpc_mpi', 'prog.py'])\n"
    )
    assert printed.split() == ["True", "__mp_main__", "1"]


class TestErrors:
    def of(self, run: RunPython, place: Path, source: str, **environment: str) -> list[str]:
        """The traceback of a program that has this source."""
        (place / "prog.py").write_text(textwrap.dedent(source))
        printed = run(
            "import os, sys; sys.stderr = sys.stdout\n",
            f"""
from torch_rpc_mpi import _program
try:
    _program.main([{str(place / "prog.py")!r}])
except Exception as error:
    import sys  # again: the program's names have taken the place of this one's
    sys.excepthook(type(error), error, error.__traceback__)
""",
            **environment,
        )
        return printed.splitlines()

    def test_are_shown_without_what_has_led_to_the_program(
        self, run_forked_with_fakes: RunPython, tmp_path: Path
    ) -> None:
        lines = self.of(run_forked_with_fakes, tmp_path, "def fail():\n    raise ValueError('no')\n\nfail()\n")
        assert [line for line in lines if line.startswith("  File")] == [
            f'  File "{tmp_path / "prog.py"}", line 4, in <module>',
            f'  File "{tmp_path / "prog.py"}", line 2, in fail',
        ]
        assert lines[-1] == "ValueError: no"

    def test_before_the_program_have_no_frames_of_ours_and_end_the_launch(
        self, run_forked_with_fakes: RunPython, tmp_path: Path
    ) -> None:
        wrong = {"TORCH_RPC_MPI_INIT_TIMEOUT": "soon"}  # read where MPI is to tell the place
        lines = self.of(run_forked_with_fakes, tmp_path, "print('begun')\n", **PMI, **wrong)
        assert not [line for line in lines if line.startswith("  File")]
        assert lines[0].startswith("ValueError: environment variable TORCH_RPC_MPI_INIT_TIMEOUT='soon'")
        assert re.match(r"torch_rpc_mpi: rank 5 .* ends with status 1, because of this ValueError", lines[-1])
        assert "begun" not in lines

    def test_of_syntax_are_pythons(self, run_forked_with_fakes: RunPython, tmp_path: Path) -> None:
        lines = self.of(run_forked_with_fakes, tmp_path, "a = (\n")
        assert [line for line in lines if line.startswith("  File")] == [f'  File "{tmp_path / "prog.py"}", line 1']
        assert lines[-1].startswith("SyntaxError")

    @pytest.mark.parametrize(
        ("arguments", "status", "text"),
        [
            (["nowhere.py"], 2, "can't open file '.*nowhere.py'.*No such file"),
            (["-m", "nowhere"], 1, "No module named nowhere"),
            (["-m", "email.nowhere"], 1, r"No module named email\.nowhere"),
            (["-m", "email"], 1, "No module named email that can be executed"),
            (["."], 1, "can't find '__main__' module in '.'"),
            ([], 1, "usage: .*python -m torch_rpc_mpi"),
            (["-m"], 1, "-m is none of its options"),
            (["-u", "prog.py"], 1, "-u is none of its options; Python's own come before -m torch_rpc_mpi"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_of_the_command_line(
        self,
        arguments: list[str],
        status: int,
        text: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [])
        with pytest.raises(SystemExit) as ended:
            _program.run(_program.parse(arguments))
        code = ended.value.code
        shown = capsys.readouterr().err + (code if isinstance(code, str) else "")
        assert (code if isinstance(code, int) else 1) == status
        assert re.search(text, shown), shown


def test_leaves_the_main_module_of_a_tool_that_runs_it(run_forked_with_fakes: RunPython, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text(PROGRAM)
    printed = run_forked_with_fakes(
        "import os, sys, __main__ as tool; sys.path.insert(0, os.getcwd()); tools = dict(vars(tool))\n",
        "from torch_rpc_mpi import _program; _program.main(['prog.py'])\n"
        "assert {**vars(tool), **tools} == vars(tool), 'the tool has lost names'\nprint('kept')\n",
    )
    report, kept, at_exit = printed.splitlines()
    assert json.loads(report)["is main"]
    assert (kept, at_exit) == ("kept", AT_EXIT)


def test_peers_without_a_launcher_are_told_of_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exit, "_watched", _exit._Watched(os.getpid(), "worker 'a'", job=None))
    monkeypatch.setattr(_exit, "_farewell", "it shut RPC down")
    _exit.program_exited(None)
    assert _exit.farewell() == "it shut RPC down"
    _exit.program_exited(3)
    assert _exit.farewell() == "it exited with status 3"


def test_interactive(run_forked_with_fakes: RunPython, tmp_path: Path) -> None:
    """The prompt comes also after an error, knows the program's names, and an error there ends nothing."""
    (tmp_path / "prog.py").write_text("x = 20\nraise ValueError('no')\n")
    printed = run_forked_with_fakes(
        "import io, sys; sys.stdin = io.StringIO('1 / 0\\nprint(x + 1)\\n'); sys.stderr = sys.stdout\n",
        f"from torch_rpc_mpi import _program; _program.main(['-i', {str(tmp_path / 'prog.py')!r}])\n",
    )
    assert "ValueError: no" in printed
    assert "ZeroDivisionError" in printed
    assert "21\n" in printed


PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-north-339@1",
}


@pytest.mark.usefixtures("no_launcher")
class TestVariables:
    """Those of torchrun, where another launcher has started the ranks."""

    def test_on_one_host(self) -> None:
        environ = {**PMI, "PMI_SIZE": "4", "PMI_RANK": "1"}
        _torchrun.set_variables(environ)
        port = int(environ.pop("MASTER_PORT"))
        assert 20000 <= port < 32000
        assert {name: value for name, value in environ.items() if name not in PMI} == {
            "TORCH_RPC_MPI_VARIABLES": "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT",
            "RANK": "1",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.1",
        }

    def test_on_several_hosts_of_a_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ports = set()
        for rank in ("1", "5"):  # of two hosts, each with a daemon of its own
            monkeypatch.setattr(_torchrun, "_stat", lambda pid, rank=rank: [rank] * 20)
            environ = {**PMI, "PMI_RANK": rank, "SLURM_JOB_NODELIST": "n[07-08]", "SLURM_JOB_ID": "12"}
            _torchrun.set_variables(environ)
            assert (environ["RANK"], environ["LOCAL_RANK"], environ["MASTER_ADDR"]) == (rank, "1", "n07")
            ports.add(environ["MASTER_PORT"])
        assert len(ports) == 1

    def test_on_one_host_are_those_of_its_daemon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ports = []
        for daemon in ("7", "7", "8"):
            monkeypatch.setattr(_torchrun, "_stat", lambda pid, daemon=daemon: [daemon] * 20)
            environ = {**PMI, "PMI_SIZE": "4", "PMI_RANK": "1", "SLURM_JOB_ID": "12"}
            _torchrun.set_variables(environ)
            ports.append(environ["MASTER_PORT"])
        assert ports[0] == ports[1] != ports[2]

    @pytest.mark.parametrize("parent", [0, 1])
    def test_come_from_mpi_where_the_environment_does_not_tell(
        self, monkeypatch: pytest.MonkeyPatch, parent: int
    ) -> None:
        """As where each rank is the first process of a namespace of its own."""
        asked = []

        def as_mpi_says(launcher: _launchers.Launcher) -> _launchers.Launcher:
            asked.append(launcher.job)
            return replace(launcher, job="north 12")

        monkeypatch.setattr("os.getppid", lambda: parent)
        monkeypatch.setattr(_torchrun, "_as_mpi_says", as_mpi_says)
        environ = {**PMI, "PMI_SIZE": "4", "PMI_RANK": "1"}
        _torchrun.set_variables(environ)
        assert asked == [None]
        assert environ["LOCAL_RANK"] == "1"

    def test_are_refused_where_mpi_would_not_learn_of_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mpi, "load", lambda timeout: pytest.fail("MPI has begun"))
        monkeypatch.setattr(_mpi, "find_library", lambda: "MPICH Version: 5.0")
        monkeypatch.setattr(_mpi, "is_initialized", lambda: False)
        for name, value in OPEN_MPI.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RuntimeError, match=r"rank 1 of 4, but mpi4py's MPICH Version: 5.0 will not learn of it"):
            _torchrun.set_variables(dict(OPEN_MPI))

    def test_wait_for_mpi_as_long_as_torch_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load(timeout: float) -> Any:
            asked.append(timeout)
            raise InterruptedError

        monkeypatch.setattr(_mpi, "load", load)
        for patience in (1800, 20):
            with pytest.raises(InterruptedError):
                _torchrun.set_variables(dict(PMI))
            monkeypatch.setenv("TORCH_RPC_MPI_INIT_TIMEOUT", "20")
            assert asked.pop() == patience

    def test_of_the_user_stay(self) -> None:
        environ = {**PMI, "PMI_SIZE": "4", "PMI_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1", "RANK": "3"}
        _torchrun.set_variables(environ)
        assert [environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")] == [
            "here",
            "1",
            "3",
            "1",
        ]

    def test_of_a_launch_are_not_those_of_one_within(self) -> None:
        environ = {**PMI, "PMI_SIZE": "1", "PMI_RANK": "0", "MPI_LOCALNRANKS": "1", "MASTER_PORT": "1"}
        _torchrun.set_variables(environ)
        _launchers.claim(environ)
        outer = dict(environ)
        _torchrun.set_variables(environ)
        assert environ == outer
        environ |= {**PMI, "PMI_SIZE": "4", "PMI_RANK": "1"}
        _torchrun.set_variables(environ)
        places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        assert [environ[name] for name in places] == ["1", "4", "1", "4", "1"]

    def test_of_torchrun_stay(self) -> None:
        environ = {**PMI, "TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
        before = dict(environ)
        _torchrun.set_variables(environ)
        assert environ == before

    def test_without_a_launcher_there_are_none(self) -> None:
        environ: dict[str, str] = {}
        _torchrun.set_variables(environ)
        assert not environ

    def test_ports_differ_from_job_to_job(self) -> None:
        ports = set()
        for job in range(50):
            environ = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
            environ |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0"}
            _torchrun.set_variables(environ)
            ports.add(environ["MASTER_PORT"])
        assert len(ports) > 45
