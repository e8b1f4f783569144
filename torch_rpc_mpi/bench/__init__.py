"""Compares RPC over MPI with TensorPipe and with MPI itself: ``python -m torch_rpc_mpi.bench``.

The backends take turns round by round, so that all of them meet the same machine in the same state. Without a launcher
worlds are started on this host; under mpirun the ranks are those that it started. See docs/performance.md for how to
read what it prints.
"""
