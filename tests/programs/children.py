"""What processes may do that a rank has started: python children.py [child RANK STORE]."""

import multiprocessing
import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed.rpc as rpc


def use_rpc(rank, world_size, store, words):
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}")
    try:
        rpc.init_rpc(f"child{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)
        words.append(rpc.rpc_sync(f"child{(rank + 1) % world_size}", torch.add, args=(torch.ones(1), rank)).item())
        rpc.shutdown()
    except RuntimeError as error:
        words.append(str(error).splitlines()[0])


def in_fork(store):
    words = []
    use_rpc(0, 2, store, words)
    print(f"forked: {words[0]}", flush=True)


def status_of_forked(ending):
    child = os.fork()
    if child == 0:
        ending()  # through all of the interpreter's end, in which the others take no part
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    rank = os.environ["RANK"]
    rpc.init_rpc(f"worker{rank}", rank=int(rank), world_size=int(os.environ["WORLD_SIZE"]))
    if rank == "0":
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "child"]
            children = [subprocess.Popen([*command, str(child), f"{scratch}/store"]) for child in range(2)]
            print("statuses", [child.wait() for child in children], flush=True)
            process = multiprocessing.get_context("fork").Process(target=in_fork, args=(f"{scratch}/forked",))
            process.start()
            process.join()
        print("endings", [status_of_forked(ending) for ending in (lambda: sys.exit(7), lambda: 1 / 0)], flush=True)
    rpc.shutdown()
    print(f"rank {rank} is done", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        words = []
        use_rpc(int(sys.argv[2]), 2, sys.argv[3], words)
        print(f"child {sys.argv[2]}: {words[0]}", flush=True)
    else:
        main()
