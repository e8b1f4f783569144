"""``python -m torch_rpc_mpi program.py ...``: see ``_program``."""

import sys

from torch_rpc_mpi import _program

if __name__ == "__main__":
    _program.main(sys.argv[1:])
