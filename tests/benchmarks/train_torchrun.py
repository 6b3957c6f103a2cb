"""The training loop under torchrun, with nothing of Ray: what `launch_training` is measured against.

usage: torchrun --nproc-per-node N train_torchrun.py - STORE RUN CONFIG
"""

import sys

import torch
import torch.distributed as dist
import train_trace
from torch.nn.parallel import DistributedDataParallel

from kintsugi.config import load_config
from kintsugi.data.dataset import open_split
from kintsugi.losses import build_loss
from kintsugi.models import PerceptualDistance
from kintsugi.storage import open_store
from kintsugi.training.loop import Worker, fit
from kintsugi.training.state import build_state


def main(_: str, store_uri: str, run: str, path: str) -> None:
    dist.init_process_group("gloo")
    train_trace.install()
    config, store = load_config(path), open_store(store_uri)
    torch.set_num_threads(config.train.threads)
    train, val = (open_split(store, config.data.dataset, split) for split in ("train", "val"))
    state = build_state(config, train.digest)
    perceptual = PerceptualDistance(config.loss.perceptual) if config.loss.weights.perceptual > 0 else None
    worker = Worker(dist.get_rank(), dist.get_world_size())
    model = DistributedDataParallel(state.model, gradient_as_bucket_view=True)
    fit(
        state, config, train, val, build_loss(config.loss, perceptual), lambda *_: None,
        model=model, worker=worker,
    )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
