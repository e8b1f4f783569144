"""Programs of the unit tests, as `python -c` runs them, but forked from a process that has torch loaded.

    python forked_program.py DESCRIPTOR

See fork_server.py; the arguments of a request are the program, its working directory, and what comes first in sys.path.
"""

import gc
import os
import sys

import fork_server
import torch.distributed.rpc  # noqa: F401 (to be there)

gc.collect()
gc.freeze()
arguments = fork_server.serve(sys.argv[1])
if arguments is not None:
    program, directory, *path = arguments
    os.chdir(directory)
    sys.path[:0] = path
    fork_server.run_as_main(program, ["-c"])
