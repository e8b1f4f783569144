"""TorchRL's RPC collector: two workers, which it starts itself, collect frames for this process."""

from torchrl.collectors import Collector
from torchrl.collectors.distributed import RPCCollector
from torchrl.envs import GymEnv

FRAMES = 4000


def main():
    collector = RPCCollector(
        [lambda: GymEnv("CartPole-v1")] * 2,
        None,
        frames_per_batch=200,
        total_frames=FRAMES,
        collector_class=Collector,
        launcher="mp",
        sync=True,
    )
    frames = sum(data.numel() for data in collector)
    collector.shutdown()
    assert frames == FRAMES, frames
    print(f"{frames} frames")


if __name__ == "__main__":
    main()
