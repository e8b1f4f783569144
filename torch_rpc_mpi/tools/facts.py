"""What the commands tell of: facts, each with a status and, if something is to be done about it, a remedy."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any, NamedTuple


class Status(enum.Enum):
    """How a fact is to be taken."""

    OK = "ok"
    NOTE = "note"  # good to know; matters in some worlds only
    WARNING = "warning"  # works, but slower than it could, or not at every size
    PROBLEM = "problem"  # does not work


@dataclasses.dataclass(frozen=True)
class Fact:
    """One line of the report."""

    key: str
    value: str
    status: Status = Status.OK
    remedy: str = ""
    host: str = ""  # of another host than the one that reports

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "status": self.status.value}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Fact:
        return Fact(**{**fields, "status": Status(fields["status"])})


def size_text(size: float) -> str:
    """Bytes as people say them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def count_text(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


class Resources(NamedTuple):
    """What may be used of the host, as csrc/host/resources.h finds it; None: not known, or no limit."""

    cores: int | None = None
    memory: int | None = None  # bytes
    cgroup_memory: int | None = None
    cgroup_cores: float | None = None
    cgroup_tasks: int | None = None


def text_of(path: Path) -> str:
    """Of a file, empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def field_of(path: Path, name: str) -> str:
    """Of a file of lines "Name: value", as /proc has many; empty if it is not there."""
    for line in text_of(path).splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""
