"""The local stack with a service and its gateway, and models good and bad, for those who break things."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from gateway import Gateway
from malformed_parts import PIXELS

from kintsugi import imaging, local
from kintsugi.checkpoint import save_checkpoint
from kintsugi.config import ExperimentConfig, with_values
from kintsugi.manifest import MANIFEST, make_manifest
from kintsugi.models import build_model
from kintsugi.registry import ModelVersion, Registry, version_key
from kintsugi.restore.golden import GOLDEN
from kintsugi.storage import ObjectStore, open_store, store_uri_from_environment

TINY = {"model.levels": 2, "model.blocks": 1, "model.base": 4, "model.skips": [True, True], "model.reduction": [2, 2],
        "model.channels": 1, "model.mask": "none"}  # fmt: skip
# Ray puts what an actor does at the moment behind its name.
REPLICA = "ray::ServeReplica:kintsugi:Replica"
STARTING = ".initialize"


@dataclass
class Plant:
    """The local stack with a service and its gateway."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def kintsugi(self, *words: str) -> str:
        command = [sys.executable, "-m", "kintsugi.cli", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"kintsugi {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    @property
    def store(self) -> ObjectStore:
        return open_store(store_uri_from_environment())

    def replicas(self) -> list[psutil.Process]:
        """Those that are ready to work, the oldest first."""
        home = str(self.folder)
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                title = " ".join(process.cmdline())
                if title.startswith(REPLICA) and STARTING not in title and process.environ()["KINTSUGI_HOME"] == home:
                    found.append(process)
            except (psutil.Error, KeyError):
                continue
        return sorted(found, key=lambda process: process.create_time())

    def s3_server(self) -> psutil.Process:
        (row,) = [process for process in psutil.process_iter() if _is_s3(process, self.folder)]
        return row


def _is_s3(process: psutil.Process, folder: Path) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and words[0].endswith("weed") and any(str(folder) in word for word in words)


@contextmanager
def plant(replicas: int) -> Iterator[tuple[Plant, Gateway, str]]:
    """A service with two versions of a tiny model, its gateway, and its own address."""
    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))  # Ray's socket paths must stay below 107 bytes
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "KINTSUGI_"))}
    # Ray's workers give way to all other processes, so that a busy machine makes minutes of every start.
    kept |= {"KINTSUGI_HOME": str(folder), "KINTSUGI_CACHE": str(folder / "cache"), "RAY_worker_niceness": "0"}
    here = Plant(folder, kept)
    ports = [part for name in ("s3", "dashboard", "tensorboard", "ray", "endpoint") for part in (f"--{name}-port", "0")]
    try:
        here.kintsugi("up", *ports, "--cpus", "8")
        os.environ |= {"KINTSUGI_HOME": str(folder), "KINTSUGI_CACHE": str(folder / "cache")}
        stack = local.activate(folder)
        assert stack is not None
        os.environ |= local.environment(stack, folder)
        for seed in (1, 2):
            publish(here, seed)
        Registry(here.store).promote("unet@1")
        sizes = ("--min-replicas", str(replicas), "--max-replicas", str(replicas), "--set", f"max_pixels={PIXELS}")
        served = json.loads(here.kintsugi("serve", "--model", "unet@production", *sizes, "--json"))
        address = served["address"]
        (folder / "gateway").mkdir()
        with Gateway([address.partition("://")[2]], folder / "gateway") as gateway:
            yield here, gateway, address
    finally:
        here.kintsugi("down")
        shutil.rmtree(folder, ignore_errors=True)


def publish(here: Plant, seed: int, spoil: str = "") -> ModelVersion:
    """A tiny model whose answer depends on `seed`; `spoil` makes it one that must not come into service."""
    torch.manual_seed(seed)
    config = with_values(ExperimentConfig(), TINY)
    model = build_model(config.model).eval()
    torch.nn.init.normal_(model.background_head.weight, std=0.02)
    checkpoint = here.folder / "checkpoints" / str(len(Registry(here.store).versions("unet")))
    save_checkpoint(checkpoint, model, config, {}, {})
    version = Registry(here.store).publish("unet", checkpoint, b"{}")
    if spoil:
        _spoil(here.store, version, spoil, here.folder / "spoilt")
    return version


def _spoil(store: ObjectStore, version: ModelVersion, kind: str, scratch: Path) -> None:
    prefix = version_key(version.name, version.number)
    if kind == "weights":
        data = bytearray(store.get(f"{prefix}/weights.safetensors"))
        data[-3] ^= 4
        store.put(f"{prefix}/weights.safetensors", bytes(data))
        return
    # A publisher's own fault: the manifest agrees with the files.
    scratch.mkdir(exist_ok=True)
    manifest = json.loads(store.get(f"{prefix}/{MANIFEST}"))
    for name in manifest["files"]:
        (scratch / name).write_bytes(store.get(f"{prefix}/{name}"))
    if kind == "golden":
        golden = imaging.decode((scratch / GOLDEN).read_bytes())
        flipped = imaging.Image((65535 - golden.pixels).astype(np.uint16), "png", 65535)
        (scratch / GOLDEN).write_bytes(imaging.encode(flipped))
        store.put(f"{prefix}/{GOLDEN}", (scratch / GOLDEN).read_bytes())
    else:
        text = (scratch / "config.yaml").read_text().replace("base: 4", "base: 8")
        (scratch / "config.yaml").write_text(text)
        store.put(f"{prefix}/config.yaml", text.encode())
    store.put(f"{prefix}/{MANIFEST}", make_manifest(scratch, "model", manifest["meta"]).model_dump_json().encode())
