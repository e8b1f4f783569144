"""The commands: ``torch-rpc-mpi COMMAND``, or ``python -m torch_rpc_mpi.tools COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import _launch
from . import doctor, first_contact
from .place import Place

_DESCRIPTION = "What would run here, whether it does, and three programs for the first contact."
_FIRST_CONTACT = {
    "hello": (first_contact.hello, "every rank says who and where it is"),
    "ring": (first_contact.ring, "a tensor goes around all ranks"),
    "pingpong": (first_contact.pingpong, "tensors of growing size between ranks 0 and 1"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("torch-rpc-mpi", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    summary = "what would run here, each problem with its remedy; under a launcher also a test of all ranks"
    doctor.add_arguments(commands.add_parser("doctor", help=summary, description=summary))
    for name, (_, what) in _FIRST_CONTACT.items():
        commands.add_parser(name, help=what, description=what)
    parsed = parser.parse_args(arguments)
    if parsed.command == "doctor":
        return doctor.main(parsed)
    command, _ = _FIRST_CONTACT[parsed.command]
    command(Place.find(_launch.complete(-1, -1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
