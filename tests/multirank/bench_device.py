"""The test device for ranks of the benchmark: `--import=bench_device`."""

import sys
from pathlib import Path

import torch_rpc_mpi

sys.path.append(str(Path(__file__).parents[1] / "device"))
import rpctest_device

torch_rpc_mpi.register_device_runtime("rpctest", rpctest_device.LIBRARY, rpctest_device.PREFIX)
