"""Several DDP workers over gloo, without Ray: what they compute together does not depend on how many they are."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from kintsugi.config import ExperimentConfig, load_config, with_values
from kintsugi.data.dataset import open_split
from kintsugi.losses import build_loss
from kintsugi.models import PerceptualDistance
from kintsugi.storage import LocalStore
from kintsugi.training.loop import Worker, fit
from kintsugi.training.state import TrainState, build_state

VALUES = {
    "train.epochs": 2, "train.steps_per_epoch": 3, "train.checkpoint_steps": 2, "train.workers": 2,
    "train.micro_batches": 2, "data.loader_processes": 0, "model.dropout": 0.2, "optim.ema": 0.9,
}  # fmt: skip


def work(rank: int, world: int, root: Path, out: Path, start: Path | None = None) -> None:
    """Train from `start`; rank 0 writes every checkpoint within an epoch and all that was reported."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    config, store = load_config(out / "config.yaml"), LocalStore(root)
    train, val = (open_split(store, "tiny", split, out / f"cache-{rank}") for split in ("train", "val"))
    state = build_state(config, train.digest)
    if start is not None:
        state.load(start)
    reported: list[dict[str, float]] = []

    def save(now: TrainState) -> None:
        if rank == 0:
            now.save(out / f"{now.epoch}-{now.step}", config, {}, {})

    loss = build_loss(config.loss, PerceptualDistance(config.loss.perceptual))
    fit(
        state, config, train, val, loss, lambda metrics, _: reported.append(dict(metrics)),
        save=save, model=DistributedDataParallel(state.model), worker=Worker(rank, world),
    )  # fmt: skip
    if rank == 0:
        (out / "reported.json").write_text(json.dumps(reported))
        state.save(out / "end", config, {}, {})
    dist.destroy_process_group()


def trained(world: int, store: LocalStore, config: ExperimentConfig, out: Path, start: Path | None = None) -> Path:
    out.mkdir()
    (out / "config.yaml").write_text(config.to_yaml())
    words = [sys.executable, __file__, str(world), str(store.root), str(out), *([str(start)] if start else [])]
    loopback = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    logs = [out / f"worker-{rank}.log" for rank in range(world)]
    workers = [
        subprocess.Popen(
            [*words[:2], str(rank), *words[2:]], env=loopback, stdout=log.open("w"), stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    codes = [worker.wait(600) for worker in workers]
    assert codes == [0] * world, "\n".join(log.read_text()[-2000:] for log in logs)
    return out


def reported(out: Path) -> list[dict[str, float]]:
    return json.loads((out / "reported.json").read_text())


@pytest.fixture(scope="module")
def config(tiny_config: ExperimentConfig) -> ExperimentConfig:
    return with_values(tiny_config, VALUES)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_store: LocalStore, config: ExperimentConfig) -> Path:
    return trained(2, tiny_store, config, tmp_path_factory.mktemp("straight") / "run")


def test_two_workers_that_go_on_within_an_epoch_compute_the_very_same(
    straight: Path, tmp_path: Path, tiny_store: LocalStore, config: ExperimentConfig
) -> None:
    resumed = trained(2, tiny_store, config, tmp_path / "run", straight / "1-2")
    assert reported(resumed) == reported(straight)[1:]
    ends = [load_file(out / "end/weights.safetensors") for out in (straight, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("world", [1, 3])
def test_fewer_or_more_workers_go_on_with_the_same_batches(
    world: int, straight: Path, tmp_path: Path, tiny_store: LocalStore, config: ExperimentConfig
) -> None:
    resumed = trained(world, tiny_store, config, tmp_path / "run", straight / "0-2")
    for own, other in zip(reported(resumed), reported(straight), strict=True):
        assert own == pytest.approx(other, rel=1e-3, abs=1e-3)


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:]))
