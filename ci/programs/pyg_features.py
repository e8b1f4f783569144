"""PyTorch Geometric's feature store: each of two processes looks up features of nodes that both have."""

import sys

import torch
import torch.multiprocessing as mp
from torch_geometric.distributed import DistContext, LocalFeatureStore
from torch_geometric.distributed.rpc import RPCRouter, global_barrier, init_rpc, rpc_partition_to_workers, shutdown_rpc

NODES, FEATURES, LOOKUPS = 4000, 256, 300


def run(rank, size, port):
    context = DistContext(rank, rank, size, size, group_name="features")
    init_rpc(context, "localhost", port)
    mine = torch.arange(rank, NODES, size)
    store = LocalFeatureStore()
    store.put_global_id(mine, group_name=None)
    store.put_tensor(mine[:, None].float().expand(-1, FEATURES).contiguous(), group_name=None, attr_name="x")
    store.meta = {"is_hetero": False}
    store.num_partitions, store.partition_idx = size, rank
    store.node_feat_pb = torch.arange(NODES) % size
    store.set_rpc_router(RPCRouter(rpc_partition_to_workers(context, size, rank)))
    global_barrier()  # one answers only when it has registered
    for lookup in range(LOOKUPS):
        index = (torch.arange(500) * (lookup + 1)) % NODES
        features = store.lookup_features(index).wait()
        assert torch.equal(features[:, 0], index.float())
    print(f"rank {rank}: {LOOKUPS} lookups")
    shutdown_rpc(f"rank {rank}")


if __name__ == "__main__":
    mp.spawn(run, args=(2, int(sys.argv[1])), nprocs=2)
