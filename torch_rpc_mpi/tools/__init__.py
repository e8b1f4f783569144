"""The command ``torch-rpc-mpi``: what would run here, whether it does, and three programs for the first contact."""
