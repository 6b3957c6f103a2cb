import resource
from pathlib import Path

import pytest

from kintsugi.doctor import installed, machine
from kintsugi.doctor.machine import GIB


def nvidia_smi(folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name, alone in PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(folder))


def test_a_gpu_that_torch_can_use_is_named_and_one_it_cannot_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, "echo NVIDIA H100", monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(installed, "cuda_of_torch", lambda: "12.8")
    assert (machine.gpu().state, machine.gpu().tells) == ("ok", "NVIDIA H100; torch is built for CUDA 12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu().mend == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(installed, "cuda_of_torch", lambda: None)
    assert machine.gpu().state == "problem" and "for CPUs" in machine.gpu().tells


@pytest.mark.parametrize("line", ["exit 9", "true"])
def test_without_a_gpu_that_answers_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    nvidia_smi(tmp_path, line, monkeypatch)
    assert machine.gpus() is None
    monkeypatch.setenv("PATH", "")
    assert machine.gpus() is None


@pytest.mark.parametrize(
    ("free", "total", "state"),
    [
        (GIB // 2, 100 * GIB, "problem"),
        (5 * GIB, 50 * GIB, "warning"),
        (30 * GIB, 1000 * GIB, "warning"),
        (90 * GIB, 1000 * GIB, "ok"),
    ],
)
def test_the_place_with_least_room_is_told(free: int, total: int, state: str) -> None:
    found = machine.disk_of({"/roomy": (900 * GIB, 1000 * GIB), "/tight": (free, total)})
    assert found.state == state and "/tight" in found.tells
    assert bool(found.mend) == (state != "ok")


def test_a_place_that_is_not_there_yet_is_measured_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINTSUGI_HOME", str(tmp_path / "not" / "yet"))
    assert machine.disk().tells
    assert not (tmp_path / "not").exists()


def test_little_shared_memory_is_a_warning_with_the_size_to_ask_for() -> None:
    found = machine.shared_memory_of(64 * 2**20, 100 * GIB)
    assert found.state == "warning" and "--shm-size=30g" in found.mend
    assert machine.shared_memory_of(30 * GIB, 100 * GIB).state == "ok"


@pytest.mark.parametrize(
    ("soft", "hard", "mend"),
    [
        (1024, 524288, "ulimit -n 65536"),
        (1024, 2048, "ulimit -n 2048"),
        (1024, resource.RLIM_INFINITY, "ulimit -n 65536"),
        (1024, 1024, "limits.conf"),
        (65536, 65536, ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, ""),
    ],
)
def test_few_open_files_are_a_warning_with_the_command_that_raises_them(soft: int, hard: int, mend: str) -> None:
    found = machine.open_files_of(soft, hard)
    assert found.state == ("warning" if mend else "ok")
    assert mend in found.mend
