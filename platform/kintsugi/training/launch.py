"""Ray Train around the loop: DDP workers, checkpoints and curves in the store, resumption by run name."""

import contextlib
import logging
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ray import train as ray_train
from ray.exceptions import RayError
from ray.train import Checkpoint as RayCheckpoint
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.metrics import Gauge
from ray.util.queue import Queue

from kintsugi.checkpoint import delete_torn, fetch_newest, load_checkpoint
from kintsugi.config import ExperimentConfig, parse_config
from kintsugi.data.dataset import SplitReader, open_split
from kintsugi.errors import KintsugiError, RunInterrupted, TrainingError
from kintsugi.losses import build_loss
from kintsugi.manifest import MANIFEST, Manifest, get_folder, put_folder
from kintsugi.models import PerceptualDistance
from kintsugi.storage import LONG, ObjectStore, open_store
from kintsugi.training.curves import Curves
from kintsugi.training.filesystem import run_storage
from kintsugi.training.loop import Worker, fit
from kintsugi.training.network import NodeNetwork
from kintsugi.training.progress import ProgressBar, progress_line
from kintsugi.training.provenance import source_commit, versions
from kintsugi.training.state import TrainState, build_state

_log = logging.getLogger(__name__)
_GIVEN_UP = "given-up.txt"
_NODES = {"kintsugi.io/role": "!serve"}
"""Workers keep off nodes that are labelled for the endpoint. A node without the label takes them."""
_NO_SCORE = -1e9
"""Of a checkpoint within an epoch. Ray keeps the best, warns where there is none, and reads infinity back as None."""


def launch_training(
    config: ExperimentConfig,
    store_uri: str,
    run: str,
    *,
    callbacks: Sequence[Any] = (),
    settings: Mapping[str, float | str] | None = None,
    init: str | None = None,
) -> None:
    """Train on the connected Ray cluster until done; the same `run` again continues from its last checkpoint.

    The checkpoints with the highest score and the last one stay under `runs/<run>/`; see
    `kintsugi.checkpoint.fetch_best`.

    Args:
        run: name below `runs/` in the store, with slashes for runs within a search.
        callbacks: Ray Train callbacks, for example Tune's. With any, checkpoints are taken at the end of an epoch
            only: Tune ends a trial whose report has no score.
        settings: hyper-parameters that TensorBoard's HParams table shows for this run.
        init: prefix in the store of a checkpoint or model version whose weights a new run starts from.

    Raises:
        RunInterrupted: workers or nodes failed more often than `train.max_failures` allows.
        TrainingError: the training itself cannot go on, for example because its loss is not finite.
    """
    payload = {
        "config": config.model_dump(mode="json"),
        "store": store_uri,
        "run": run,
        "settings": dict(settings or {}),
        "init": init,
        "within_epochs": not callbacks,
        "commit": source_commit(),
    }
    parent, _, name = f"runs/{run}".rpartition("/")
    # Ray's dashboard shows trainings only where this is set when one begins.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    live = None if callbacks or not sys.stderr.isatty() else _Live(config.train.epochs, name)
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config=payload,
        torch_config=NodeNetwork(),
        scaling_config=_scaling(config),
        run_config=RunConfig(
            name=name,
            **run_storage(f"{store_uri}/{parent}"),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
            callbacks=[*callbacks, *([live.callback] if live else [])],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    store, given_up = open_store(store_uri, LONG), f"runs/{run}/{_GIVEN_UP}"
    store.delete(given_up)
    try:
        with live or contextlib.nullcontext():
            trainer.fit()
    except Exception as error:  # Ray wraps whatever a worker raised in errors of its own
        raise _told(error, run) from error
    if store.exists(given_up):
        raise TrainingError(store.get(given_up).decode())


def _scaling(config: ExperimentConfig) -> ScalingConfig:
    train = config.train
    resources = {"CPU": train.cpus_per_worker, **({"GPU": 1} if train.gpu else {})}
    elastic = train.min_workers is not None and train.min_workers < train.workers
    workers = (train.min_workers, train.workers) if elastic else train.workers
    return ScalingConfig(
        num_workers=workers,  # pyright: ignore[reportArgumentType]
        use_gpu=train.gpu,
        resources_per_worker=resources,
        label_selector=_NODES,
    )


def _worker_loop(payload: dict[str, Any]) -> None:
    """Train. What training again cannot mend is left in the store for the driver: after an error Ray starts anew."""
    try:
        _train(payload)
    except TrainingError as error:
        open_store(payload["store"], LONG).put(f"runs/{payload['run']}/{_GIVEN_UP}", str(error).encode())


def _train(payload: dict[str, Any]) -> None:
    # At INFO botocore tells where it found credentials and Ray Train every metric once more: not for the driver.
    logging.getLogger().setLevel(logging.WARNING)
    config = parse_config(payload["config"])
    store = open_store(payload["store"], LONG)
    torch.set_num_threads(config.train.threads)
    train = open_split(store, config.data.dataset, "train")
    val = open_split(store, config.data.dataset, "val")
    context, device = ray_train.get_context(), get_device()
    if context.get_world_rank() == 0:
        _tell_skipped(train, val)
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, _Notice())
    state = build_state(config, train.digest, device)
    before = _continue(state, store, payload["run"], worker)
    if before is None and payload["init"] is not None:
        _start_from(state, store, payload["init"])
    loss = build_loss(config.loss, _perceptual(config)).to(device)
    with Curves(store, f"runs/{payload['run']}/curves", payload["settings"]) as curves:
        about = card(config, train, val, worker.world, state, before, payload["init"], payload["commit"])
        steps = config.train.steps_per_epoch or -(-len(train) // config.data.batch_size)
        images = steps * config.data.batch_size
        report = _Reporter(config, store, curves, about, images, worker.rank, payload["run"])
        model = prepare_model(state.model, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
        save = report.save if payload["within_epochs"] else None
        show = curves.show if worker.rank == 0 else None
        fit(state, config, train, val, loss, report, save=save, show=show, model=model, worker=worker)


def _continue(state: TrainState, store: ObjectStore, run: str, worker: Worker) -> dict[str, Any] | None:
    """Bring every worker to the run's newest whole checkpoint; that one's card, None where there is none.

    The store is asked, not `ray.train.get_checkpoint()`: Ray notes a checkpoint some time after it was
    uploaded, and a driver that died in between would train the epoch again. Rank 0 chooses for all, since
    two listings may differ.
    """
    with tempfile.TemporaryDirectory(prefix="kintsugi-resume-") as scratch:
        folder = Path(scratch)
        if worker.rank == 0:
            torn = delete_torn(store, run)
            _Gauges(run).set({"torn_uploads": len(torn)})
            if torn:
                _log.warning("run %s: deleted %d uploads that never ended", run, len(torn))
        prefix = broadcast_from_rank_zero(fetch_newest(store, run, folder) if worker.rank == 0 else None)
        if prefix is None:
            return None
        if worker.rank > 0:
            get_folder(store, prefix, folder)
        state.load(folder)
        return load_checkpoint(folder).card


def _start_from(state: TrainState, store: ObjectStore, prefix: str) -> None:
    with tempfile.TemporaryDirectory(prefix="kintsugi-init-") as scratch:
        get_folder(store, prefix, Path(scratch))
        state.start_from(load_checkpoint(Path(scratch)))


def _tell_skipped(*readers: SplitReader) -> None:
    for reader in readers:
        if reader.skipped:
            named = "; ".join(f"{row.name}: {row.reason}" for row in reader.skipped)
            sys.stderr.write(f"{len(reader.skipped)} bad {reader.source.split} images are skipped ({named})\n")


class _Notice:
    """Whether a node of this run will be taken away: said once for each notice, to all workers alike."""

    def __init__(self) -> None:
        self._known: int | None = None

    def __call__(self) -> bool:
        info = ray_train.get_preemption_info()
        deadline = None if info is None else info.deadline_ms
        new = deadline is not None and deadline != self._known
        self._known = deadline
        return new


class _Reporter:
    """Hand metrics and checkpoints to Ray, to TensorBoard and to the person who watches."""

    def __init__(
        self,
        config: ExperimentConfig,
        store: ObjectStore,
        curves: Curves,
        about: dict[str, Any],
        images: int,
        rank: int,
        run: str,
    ) -> None:
        """`images`: in an epoch, over all workers."""
        self._config, self._store, self._curves, self._about = config, store, curves, about
        self._images, self._rank, self._run = images, rank, run
        self._label, self._gauges = run.rpartition("/")[2], _Gauges(run)
        self._started = time.monotonic()

    def __call__(self, metrics: Mapping[str, float], state: TrainState) -> None:
        """At the end of an epoch."""
        seconds, self._started = time.monotonic() - self._started, time.monotonic()
        speed = self._speed(seconds)
        if self._rank == 0:
            self._curves.log({**metrics, **speed}, state.epoch)
            self._gauges.set({**metrics, **speed})
        self._send(metrics, state, speed)
        if self._rank == 0:
            # Not print(): Ray Train replaces it in its workers and shows every line twice.
            sys.stderr.write(
                f"{self._label} {progress_line({**metrics, **speed}, self._config.train.epochs, seconds)}\n"
            )

    def _speed(self, seconds: float) -> dict[str, float]:
        """Of the epoch with its validation; an epoch that was entered halfway looks faster than it was."""
        found = {"train/images_per_second": self._images / seconds, "train/seconds": seconds}
        if torch.cuda.is_available():
            found["train/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return found

    def save(self, state: TrainState) -> None:
        """Within an epoch."""
        self._send({"epoch": state.epoch, "step": state.step}, state, {})

    def _send(self, metrics: Mapping[str, float], state: TrainState, speed: Mapping[str, float]) -> None:
        told = {"score": _NO_SCORE, **metrics, **speed}
        if self._rank > 0:
            ray_train.report(told, checkpoint=None)
            return
        with tempfile.TemporaryDirectory(prefix="kintsugi-checkpoint-") as folder:
            state.save(Path(folder), self._config, metrics, self._about)
            checkpoint = RayCheckpoint.from_directory(folder)
            ray_train.report(told, checkpoint=checkpoint, checkpoint_upload_fn=self._upload)

    def _upload(self, checkpoint: RayCheckpoint, name: str) -> RayCheckpoint:
        """Its manifest goes last: Ray's own copy goes in any order, and what it leaves when killed looks whole."""
        folder = Path(checkpoint.path)
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        put_folder(self._store, f"runs/{self._run}/{name}", folder, manifest)
        storage: Any = ray_train.get_context().get_storage()
        return RayCheckpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)


class _Gauges:
    """The latest figures of a run among Ray's metrics, hence Prometheus's: `kintsugi_train_...`, tagged `run`."""

    def __init__(self, run: str) -> None:
        self._run, self._known = run, dict[str, Gauge]()

    def set(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name not in self._known:
                metric = re.sub(r"\W+", "_", name.removeprefix("train/"))
                about = f"{name}, as the run told it last"
                self._known[name] = Gauge(f"kintsugi_train_{metric}", about, tag_keys=("run",))
            self._known[name].set(float(value), {"run": self._run})


class _ToDriver(UserCallback):
    """Runs in Ray's controller, a process of its own, and must not keep it waiting."""

    def __init__(self, queue: Queue) -> None:
        self._actor: Any = queue.actor

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._actor.put_nowait.remote(metrics[0])


class _Live:
    """A progress bar in the driver, fed by the controller. It may fall silent; it never ends a run."""

    def __init__(self, epochs: int, label: str) -> None:
        self._queue = Queue(actor_options={"num_cpus": 0})
        self._bar, self._feeder = ProgressBar(epochs, label), threading.Thread(target=self._feed, daemon=True)
        self.callback = _ToDriver(self._queue)

    def _feed(self) -> None:
        with contextlib.suppress(RayError):
            while (metrics := self._queue.get()) is not None:
                self._bar.show(metrics)

    def __enter__(self) -> None:
        self._bar.__enter__()
        self._feeder.start()

    def __exit__(self, *raised: Any) -> None:
        actor: Any = self._queue.actor
        actor.put_nowait.remote(None)
        self._feeder.join(timeout=5)
        self._queue.shutdown(force=True)
        self._bar.__exit__(*raised)


def card(
    config: ExperimentConfig,
    train: SplitReader,
    val: SplitReader,
    world: int,
    state: TrainState,
    before: Mapping[str, Any] | None = None,
    init: str | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """How the model came to be, kept in its checkpoint; `before` is the card of the checkpoint that it goes on from."""
    weights = config.loss.perceptual.weights
    used = config.loss.weights.perceptual > 0
    history = list(before["workers"]) if before else []
    return {
        "dataset": config.data.dataset,
        "dataset_digest": train.digest,
        "skipped": {r.source.split: [asdict(row) for row in r.skipped] for r in (train, val)},
        "init": before["init"] if before else init,
        "perceptual": f"{config.loss.perceptual.network}, {weights} weights" if used else "not used",
        "workers": [*history, {"epoch": state.epoch, "step": state.step, "world_size": world}],
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "commit": commit,
        "versions": versions(),
    }


def _perceptual(config: ExperimentConfig) -> PerceptualDistance | None:
    return PerceptualDistance(config.loss.perceptual) if config.loss.weights.perceptual > 0 else None


def check_perceptual(config: ExperimentConfig) -> None:
    """Load the feature network once before anything starts, so that missing weights are told at once."""
    if config.loss.perceptual.weights != "random":
        _perceptual(config)


def _told(error: Exception, run: str) -> KintsugiError:
    """The one of our own errors that lies inside what Ray raised, or a sentence about the rest."""
    seen: BaseException | None = error
    while seen is not None:
        for inner in (seen, *getattr(seen, "worker_failures", {}).values()):
            cause = getattr(inner, "cause", inner)
            if isinstance(cause, KintsugiError):
                return cause
        seen = seen.__cause__
    return RunInterrupted(f"run {run} failed ({type(error).__name__}: {error}): the same --run continues it")
