"""``python -m torch_rpc_mpi program.py ...``: see ``_program``."""

import sys

from torch_rpc_mpi import _program

_program.main(sys.argv[1:])
