"""Runs a program as Python itself would, with backend ``"MPI"`` for what asks for TensorPipe.

Note [The program's __main__]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
The program becomes the module ``__main__`` that the interpreter has made for this package's own, with all that Python
sets there, and stays it until the process ends. So what it defines there is found by name at any time, by callees and
by handlers at exit, and multiprocessing's children find the file or the module by which they can import it. ``runpy``
puts its own ``__main__`` back when the program's code has run.
"""

from __future__ import annotations

import builtins
import code
import importlib.machinery
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType, TracebackType
from typing import Any

from . import _drop_in, _exit, _launchers, _torchrun

_USAGE = (
    "usage: [mpirun -n N] python -m torch_rpc_mpi [-i] (PROGRAM.py | -m MODULE | -c CODE | -) [ARGUMENT...]\n"
    "Runs the program as python does, over MPI instead of TensorPipe; see docs/from_tensorpipe.md."
)


@dataclass
class Request:
    """What the command line asks for."""

    kind: str  # "file", "-m", "-c" or "-"
    what: str
    arguments: list[str]
    interactive: bool = False


@dataclass
class Program:
    """A program before it runs: its code, and what Python has in ``__main__`` and ``sys`` when it begins."""

    code: CodeType
    name: str  # sys.argv[0]
    first_path: str | None  # sys.path[0]; None for the one that is there
    loader: Any = importlib.machinery.BuiltinImporter
    spec: ModuleSpec | None = None
    names: dict[str, Any] = field(default_factory=dict)


def main(arguments: list[str]) -> None:
    """Runs the program; its end is this process's."""
    request = parse(arguments)
    process = os.getpid()  # whose children by fork() come here as well
    sys.excepthook = _show
    try:
        _drop_in.switch_on()
        _torchrun.set_variables()
        _launchers.claim()
        run(request)
    except SystemExit as error:
        if os.getpid() == process:
            _exit.program_exited(error.code)
        raise
    except BaseException as error:
        if os.getpid() == process:
            _exit.program_raised(error)
        raise


def parse(arguments: list[str]) -> Request:
    """Python's own reading of these options. Ends the process where they make no sense."""
    left, interactive = list(arguments), False
    while left and left[0].startswith("-") and left[0] != "-":
        word = left.pop(0)
        if word in ("-h", "--help"):
            print(_USAGE)
            sys.exit(0)
        for index, letter in enumerate(word[1:], 1):
            if letter == "i":
                interactive = True
            elif letter in "mc" and (word[index + 1 :] or left):
                what = word[index + 1 :] or left.pop(0)
                return Request(f"-{letter}", what, left, interactive)
            else:
                sys.exit(f"{_USAGE}\n{word} is none of its options; Python's own come before -m torch_rpc_mpi")
    if not left:
        sys.exit(_USAGE)
    what = left.pop(0)
    return Request("-" if what == "-" else "file", what, left, interactive)


def run(request: Request) -> None:
    """Runs the program in ``__main__``, and after it Python's prompt, if that is asked for."""
    sys.argv = [request.kind if request.kind == "-m" else request.what, *request.arguments]
    program = _LOADERS[request.kind](request.what)
    sys.argv[0] = program.name
    if program.first_path is not None:
        sys.path[0] = program.first_path
    names = _main_module().__dict__
    names.clear()
    names |= {
        "__name__": "__main__",
        "__doc__": None,
        "__package__": None if program.spec is None else program.spec.parent,
        "__loader__": program.loader,
        "__spec__": program.spec,
        "__builtins__": builtins,
        **program.names,
    }
    if not request.interactive:
        _execute(program.code, names)
        return
    sys.ps1 = ">>> "  # the sign of interactive use, which no error ends
    try:
        _execute(program.code, names)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    code.interact(banner="", local=names, exitmsg="")


def _main_module() -> ModuleType:
    """What becomes the program's ``__main__``: not that of a tool that runs this package, such as cProfile."""
    module = sys.modules["__main__"]
    if getattr(getattr(module, "__spec__", None), "name", None) != f"{__package__}.__main__":
        module = sys.modules["__main__"] = ModuleType("__main__")
    return module


def _execute(program: CodeType, names: dict[str, Any]) -> None:
    exec(program, names)


def _of_file(path: str) -> Program:
    full = os.path.abspath(path)
    importer = pkgutil.get_importer(full)
    if importer is not None:  # a directory, or a zip file
        spec = importer.find_spec("__main__", None)
        if spec is None or spec.loader is None:
            sys.exit(f"{sys.executable}: can't find '__main__' module in {path!r}")
        return _of_spec(spec, path, full)
    loader = importlib.machinery.SourceFileLoader("__main__", full)
    try:
        content = loader.get_data(full)
    except OSError as error:
        print(f"{sys.executable}: can't open file {full!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        sys.exit(2)
    names = {"__file__": full, "__cached__": None}
    directory = None if _is_safe_path() else os.path.dirname(os.path.realpath(path))
    if path.endswith(".pyc") or content.startswith(importlib.util.MAGIC_NUMBER):
        compiled = importlib.machinery.SourcelessFileLoader("__main__", full)
        found = compiled.get_code("__main__")
        assert found is not None  # such a loader's is None for modules that are not Python's alone
        return Program(found, path, directory, compiled, None, names)
    return Program(loader.source_to_code(content, full), path, directory, loader, None, names)


def _of_module(name: str) -> Program:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    if spec is None or spec.loader is None:
        sys.exit(f"{sys.executable}: No module named {name} that can be executed")
    return _of_spec(spec, spec.origin or name, None)


def _of_spec(spec: ModuleSpec, name: str, first_path: str | None) -> Program:
    found = spec.loader.get_code(spec.name)  # type: ignore[union-attr]
    if found is None:
        sys.exit(f"{sys.executable}: No code object available for {spec.name}")
    return Program(found, name, first_path, spec.loader, spec, {"__file__": spec.origin, "__cached__": spec.cached})


def _of_text(source: str, name: str, where: str) -> Program:
    return Program(compile(source, where, "exec", dont_inherit=True), name, None if _is_safe_path() else "")


def _is_safe_path() -> bool:
    return bool(getattr(sys.flags, "safe_path", sys.flags.isolated))


_LOADERS: dict[str, Callable[[str], Program]] = {
    "file": _of_file,
    "-m": _of_module,
    "-c": lambda source: _of_text(source, "-c", "<string>"),
    "-": lambda _: _of_text(sys.stdin.read(), "-", "<stdin>"),
}


# What says by its text why a program cannot begin.
_TOLD = (ImportError, RuntimeError, ValueError)


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Shows an exception as Python does, without the frames that have led to the program."""
    frame = traceback
    while frame is not None and frame.tb_frame.f_code is not _execute.__code__:
        frame = frame.tb_next
    if frame is not None:
        traceback = frame.tb_next
    elif isinstance(error, SyntaxError):  # the program's own
        traceback = None
    elif isinstance(error, _TOLD):
        while traceback is not None and _is_ours(traceback):
            traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def _is_ours(traceback: TracebackType) -> bool:
    """Whether this frame is this package's, or of ``runpy``, which has called it."""
    module = traceback.tb_frame.f_globals.get("__name__", "")
    return module in ("__main__", "runpy") or f"{module}.".startswith(f"{__package__}.")
