"""Records what cmake/ImportTorch.cmake reads of an installed torch, for test_import_torch.py.

    python tests/unit/recorded_torch/record.py 2.13.0-cuda [DIRECTORY OF THE TORCH PACKAGE]

The recorded CMake file is what CMake wrote about the targets, without the checks around it. Of the libraries, whose
strings are read, the few that are about the ABIs are kept.
"""

import importlib.util
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
STRINGS = {
    "c10": rb"_ZN3c105ErrorC[12]E[\w.]+",
    "torch_python": rb"__pybind11_(?:internals|module_local)_v\w+",
}


def record(name: str, torch: Path) -> None:
    """Makes directory ``name`` beside this file."""
    directory = HERE / name
    directory.mkdir()
    targets = (torch / "share" / "cmake" / "Caffe2" / "Caffe2Targets.cmake").read_text()
    _, first, rest = targets.partition("# Create imported target ")
    text, _, _ = (first + rest).partition("# Load information for each installed configuration.")
    (directory / "Caffe2Targets.cmake").write_text(text.rstrip() + "\n")
    for library, pattern in STRINGS.items():
        content = (torch / "lib" / f"lib{library}.so").read_bytes()
        strings = sorted({match.decode() for match in re.findall(pattern, content)})
        (directory / f"lib{library}.txt").write_text("".join(f"{string}\n" for string in strings))


if __name__ == "__main__":
    name, *where = sys.argv[1:]
    if where:
        record(name, Path(where[0]))
    else:
        record(name, Path(importlib.util.find_spec("torch").origin).parent)
