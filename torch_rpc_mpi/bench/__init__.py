"""Compares RPC over MPI with TensorPipe and with MPI itself: ``python -m torch_rpc_mpi.bench``.

The backends run side by side, each with two ranks of its own, and take turns round by round, so that all of them meet
the same machine in the same state. See docs/performance.md for how to read what it prints.
"""
