"""The manifests as kustomize composes them, and what KubeRay makes of them."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "infra/kuberay"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
COMPOSED = ("base", "fault-tolerance", "overlays/dev", "overlays/prod")
JOBS = ("jobs/train.yaml", "jobs/tune.yaml")


@dataclass(frozen=True)
class PodTemplate:
    """A pod that will run; `labels` with those that KubeRay adds, `spec` with the containers that it adds."""

    owner: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@dataclass(frozen=True)
class Manifests:
    """Everything that one folder applies, and the jobs."""

    folder: str
    documents: tuple[dict[str, Any], ...]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str, name: str = "kintsugi") -> dict[str, Any]:
        (found,) = (document for document in self.of(kind) if document["metadata"]["name"] == name)
        return found

    def ray_clusters(self) -> list[tuple[str, dict[str, Any]]]:
        clusters = [("RayCluster", document["spec"]) for document in self.of("RayCluster")]
        return [*clusters, *(("RayService", one["spec"]["rayClusterConfig"]) for one in self.of("RayService"))]

    def pods(self) -> list[PodTemplate]:
        return list(self._pods())

    def _pods(self) -> Iterator[PodTemplate]:
        for kind in ("Deployment", "StatefulSet"):
            for document in self.of(kind):
                yield _pod(f"{kind} {document['metadata']['name']}", document["spec"]["template"])
        for document in self.of("RayJob"):
            yield _pod(f"RayJob {document['metadata']['name']}", document["spec"]["submitterPodTemplate"])
        for kind, spec in self.ray_clusters():
            yield from _ray_pods(kind, spec)


def _pod(owner: str, template: dict[str, Any], **labels: str) -> PodTemplate:
    return PodTemplate(owner, {**template["metadata"]["labels"], **labels}, template["spec"])


def _ray_pods(kind: str, spec: dict[str, Any]) -> Iterator[PodTemplate]:
    """As KubeRay completes them: labels of its own, the autoscaler beside the head, a first container in workers."""
    head = spec["headGroupSpec"]
    options = spec["autoscalerOptions"]
    autoscaler = {
        "name": "autoscaler",
        "image": head["template"]["spec"]["containers"][0]["image"],
        **{key: options[key] for key in ("env", "resources", "securityContext", "volumeMounts")},
    }
    spec_of_pod = head["template"]["spec"]
    template = {**head["template"], "spec": {**spec_of_pod, "containers": [*spec_of_pod["containers"], autoscaler]}}
    own = {"ray.io/node-type": "head", "ray.io/group": "headgroup", **head["labels"]}
    yield _pod(f"{kind} head", template, **own)
    for group in spec["workerGroupSpecs"]:
        own = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"], **group["labels"]}
        yield _pod(f"{kind} {group['groupName']}", group["template"], **own)


@cache
def _kubectls() -> tuple[str, ...]:
    folders = [*os.environ.get("PATH", "").split(os.pathsep), str(ROOT / ".kintsugi/debian/usr/bin")]
    found = (Path(path).resolve() for folder in folders if (path := shutil.which("kubectl", path=folder)))
    return tuple(dict.fromkeys(map(str, found)))


@cache
def _composed(kubectl: str, folder: str) -> str:
    command = [kubectl, "kustomize", str(KUBERAY / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def kubectls() -> tuple[str, ...]:
    if not _kubectls():
        pytest.skip("there is no kubectl: run 'make kubectl', or install it")
    return _kubectls()


@pytest.fixture(scope="session")
def compose(kubectls: tuple[str, ...]) -> Callable[..., Manifests]:
    """The documents of a folder; fresh ones each time, so that a test may spoil them."""

    def load(folder: str, kubectl: str = kubectls[0]) -> Manifests:
        return Manifests(folder, tuple(yaml.load_all(_composed(kubectl, folder), Loader=LOADER)))

    return load


@pytest.fixture(scope="session")
def jobs() -> tuple[dict[str, Any], ...]:
    return tuple(yaml.safe_load((KUBERAY / name).read_text()) for name in JOBS)


@pytest.fixture(params=COMPOSED)
def manifests(request: pytest.FixtureRequest, compose: Callable[..., Manifests], jobs: Any) -> Manifests:
    """What each folder composes to, with the jobs."""
    composed = compose(request.param)
    return Manifests(composed.folder, (*composed.documents, *jobs))
