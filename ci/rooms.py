"""Compares the rooms of csrc/ with the table in docs/architecture.md: python ci/rooms.py [--print].

The table lists the rooms from the top of the house to its ground, and the rooms that each uses. What is true follows
from the #include directives: a file lies in a room, a room uses those that the table names for it and no other, all of
them below it, and only python/ knows pybind11. With --print: the table's first two columns, as they should be.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
INCLUDE = re.compile(r'^#include ["<]([^">]+)[">]', re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)/` \| ([^|]*) \|", re.MULTILINE)
PYBIND = ("pybind11/", "torch/csrc/utils/pybind.h", "torch/csrc/jit/python/", "torch/csrc/autograd/python_")


def documented() -> dict[str, list[str]]:
    table = (ROOT / "docs" / "architecture.md").read_text()
    return {room: re.findall(r"`(\w+)/`", uses) for room, uses in ROW.findall(table)}


def check() -> list[str]:
    rooms = documented()
    order = list(rooms)
    used: dict[str, set[str]] = {room: set() for room in rooms}
    errors = []
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".c"):
            continue
        name = str(path.relative_to(SOURCES))
        room = name.split("/")[0]
        if room not in rooms:
            errors.append(f"{name} lies in no room of docs/architecture.md")
            continue
        for included in INCLUDE.findall(path.read_text()):
            if included.startswith(PYBIND) and room != "python":
                errors.append(f"{name} includes {included}: only python/ knows Python")
            other = included.split("/")[0]
            if other == room or not (SOURCES / included).is_file():
                continue
            used[room].add(other)
            if order.index(other) < order.index(room):
                errors.append(f"{name} includes {included}, which is above it")
    for room, named in rooms.items():
        actual = sorted(used[room], key=order.index)
        if "--print" in sys.argv:
            print(f"| `{room}/` | {', '.join(f'`{other}/`' for other in actual) or 'none'} |")
        if named != actual:
            errors.append(f"docs/architecture.md: {room}/ uses {actual}, not {named}")
    return errors


if __name__ == "__main__":
    sys.exit("\n".join(check()) or 0)
