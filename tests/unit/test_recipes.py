"""The recipes of packaging/: that they can be read, and ask for what the package asks for.

That the packages which they name exist, in which versions, packaging/README.md says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import torch_rpc_mpi

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
PROJECT = (ROOT / "pyproject.toml").read_text()
SETUP = (ROOT / "setup.py").read_text()
# The least versions, as the project's own metadata has them.
LEAST = {
    "python": re.search(r'requires-python = ">=([\d.]+)"', PROJECT),
    "setuptools": re.search(r'"setuptools>=([\d.]+)"', PROJECT),
    "cmake": re.search(r'requires = .*"cmake>=([\d.]+)"', PROJECT),
    "mpi4py": re.search(r'"mpi4py>=([\d.]+)"', SETUP),
    "cloudpickle": re.search(r'"cloudpickle>=([\d.]+)"', SETUP),
}


def least(name: str) -> tuple[int, ...]:
    found = LEAST[name]
    assert found is not None, name
    return version(found[1])


def version(text: str) -> tuple[int, ...]:
    numbers = tuple(map(int, text.split(".")))
    return numbers[:-1] if numbers[-1] == 0 and len(numbers) > 1 else numbers


def test_spack(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, str]] = []

    def directive(name: str) -> Callable[..., Any]:
        def record(first: str = "", **options: Any) -> Callable[[Any], Any]:
            called.append((name, first))
            return lambda function: function

        return record

    names = ("license", "version", "depends_on", "conflicts", "run_after", "on_package_attributes")
    spack, builtin = ModuleType("spack.package"), ModuleType("spack_repo.builtin.build_systems.python")
    for name in names:
        setattr(spack, name, directive(name))
    builtin.PythonPackage = type("PythonPackage", (), {})  # type: ignore[attr-defined]
    for module in (spack, builtin):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    recipe = PACKAGING / "spack" / "py_torch_rpc_mpi" / "package.py"
    exec(compile(recipe.read_text(), recipe, "exec"), {})
    assert ("version", torch_rpc_mpi.__version__) in called
    wanted = dict(text.partition("@")[::2] for name, text in called if name == "depends_on")
    for package in ("python", "cmake", "py-setuptools", "py-mpi4py", "py-cloudpickle"):
        assert version(wanted[package].rstrip(":")) == least(package.removeprefix("py-")), package
    assert wanted["py-torch"] == "2.6:2.14+distributed+tensorpipe"
    assert "ninja" in wanted


def test_easybuild() -> None:
    (recipe,) = (PACKAGING / "easybuild").glob("*.eb")
    found: dict[str, Any] = {"SOURCE_TAR_GZ": "%(name)s-%(version)s.tar.gz"}
    exec(compile(recipe.read_text(), recipe, "exec"), found)
    assert found["version"] == torch_rpc_mpi.__version__
    toolchain = "-".join(found["toolchain"].values())
    assert recipe.name == f"{found['name']}-{found['version']}-{toolchain}.eb"
    has = dict((*found["builddependencies"], *found["dependencies"]))
    for module, name in (("Python", "python"), ("CMake", "cmake"), ("mpi4py", "mpi4py")):
        assert version(has[module]) >= least(name), module
    assert (2, 6) <= version(has["PyTorch"]) < (2, 15)
    assert {"Ninja", "Python-bundle-PyPI"} <= set(has)


def test_conda_forge() -> None:
    """Without a reader of YAML, which the tests do not need otherwise."""
    text = (PACKAGING / "conda-forge" / "recipe.yaml").read_text()
    assert f'version: "{torch_rpc_mpi.__version__}"' in text
    for name in ("setuptools", "cmake", "mpi4py", "cloudpickle"):
        found = re.search(rf"- {name} >=([\d.]+)", text)
        assert found is not None, name
        assert version(found[1]) == least(name), name
    assert "- pytorch >=2.6" in text
