"""Loads the compiled extension, or says why it does not load and what to do about it."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch


def load() -> ModuleType:
    """The extension module ``torch_rpc_mpi._C``. Raises ImportError with the remedy when it does not load."""
    reinstall = (
        "Reinstall it in this environment: `pip install --force-reinstall --no-deps torch_rpc_mpi` (or `pip install .` "
        "in its source tree)."
    )
    try:
        extension = importlib.import_module("torch_rpc_mpi._C")
    except ImportError as error:
        package = Path(__file__).resolve().parent
        if error.name == "torch_rpc_mpi._C" and (package.parent / "pyproject.toml").exists():
            raise ImportError(
                f"Python has imported the sources of torch_rpc_mpi in {package}, which have no compiled extension. Run "
                "the program from another directory, or with `python -I`, to use the installed package; or install "
                "the sources where they are: `pip install --editable .`"
            ) from error
        raise ImportError(
            f"the extension of torch_rpc_mpi does not load into torch {torch.__version__}: {error}. It was built for "
            f"torch {_built_for() or 'of another release'}. {reinstall}"
        ) from error
    built_for = extension.__torch_version__
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(
            f"torch_rpc_mpi was built for torch {built_for}, but this is torch {torch.__version__}. {reinstall}"
        )
    return extension


def _built_for() -> str | None:
    """The torch of an extension that does not load, as its file says."""
    try:
        spec = importlib.util.find_spec("torch_rpc_mpi._C")
        content = Path(spec.origin).read_bytes() if spec is not None and spec.origin else b""
    except (OSError, ValueError):
        return None
    found = re.search(rb"torch_rpc_mpi was built for torch ([0-9][\w.+]*)", content)
    return found[1].decode() if found else None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
