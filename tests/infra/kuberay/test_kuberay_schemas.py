"""Every manifest against the schemas that a cluster would hold it to, and stricter: unknown fields are refused."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[3]
CRDS = ROOT.parent / "shared/kuberay"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the schemas have 4 MB
KINDS = ("RayCluster", "RayJob", "RayService")
KUBERNETES = ("1.29", "1.37")
"""The oldest and the newest that the manifests are held to."""


def _closed(schema: Any) -> Any:
    """The schema without room for what it does not name, as an API server that drops such fields sees it."""
    if isinstance(schema, list):
        return [_closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    known = {key: _closed(value) for key, value in schema.items() if key != "properties"}
    properties = {name: _closed(value) for name, value in schema.get("properties", {}).items()}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not keeps:
        known["additionalProperties"] = False
    return {**known, "properties": properties} if properties else known


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Kind -> what its version v1 may hold."""
    if not CRDS.is_dir():
        pytest.skip("the schemas of KubeRay's resources are not here")
    found = {}
    for kind in KINDS:
        definition = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=LOADER)
        (version,) = (entry for entry in definition["spec"]["versions"] if entry["name"] == "v1")
        closed = _closed(version["schema"]["openAPIV3Schema"])
        # The API server knows the metadata of every object itself.
        closed["properties"]["metadata"] = {
            "type": "object",
            "properties": {name: {} for name in ("name", "namespace", "labels", "annotations")},
            "additionalProperties": False,
        }
        found[kind] = closed
    return found


def _misfits(schemas: dict[str, Any], document: dict[str, Any]) -> list[str]:
    errors = jsonschema.Draft202012Validator(schemas[document["kind"]]).iter_errors(document)
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


def test_what_kuberay_reads_fits_its_schemas(manifests: Any, schemas: dict[str, Any]) -> None:
    ours = [document for document in manifests.documents if document["apiVersion"] == "ray.io/v1"]
    assert sorted({document["kind"] for document in ours}) == sorted(KINDS)
    assert [misfit for document in ours for misfit in _misfits(schemas, document)] == []


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("RayCluster", ()),
        ("RayCluster", ("metadata",)),
        ("RayCluster", ("spec",)),
        ("RayCluster", ("spec", "autoscalerOptions", "securityContext")),
        ("RayCluster", ("spec", "headGroupSpec", "headService", "metadata")),
        ("RayCluster", ("spec", "headGroupSpec", "template", "metadata")),
        ("RayCluster", ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "livenessProbe")),
        ("RayService", ("spec",)),
        ("RayService", ("spec", "rayClusterConfig", "gcsFaultToleranceOptions", "redisPassword")),
        ("RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec")),
        ("RayJob", ("spec",)),
        ("RayJob", ("spec", "submitterPodTemplate", "spec", "containers", 0, "resources")),
    ],
)
def test_a_misspelt_field_is_refused(
    compose: Callable[..., Any], jobs: Any, schemas: dict[str, Any], kind: str, place: tuple[str | int, ...]
) -> None:
    documents = {document["kind"]: document for document in (*compose("fault-tolerance").documents, *jobs)}
    spoilt = copy.deepcopy(documents[kind])
    inside: Any = spoilt
    for step in place:
        inside = inside[step]
    inside["replcias"] = 1
    (misfit,) = _misfits(schemas, spoilt)
    assert "replcias" in misfit


def test_a_value_of_the_wrong_type_is_refused(compose: Callable[..., Any], schemas: dict[str, Any]) -> None:
    cluster = compose("base").one("RayCluster")
    cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    cluster["spec"]["authOptions"]["mode"] = "tokens"
    assert len(_misfits(schemas, cluster)) == 2


@pytest.mark.parametrize("version", KUBERNETES)
def test_what_kubernetes_reads_fits_its_schemas(manifests: Any, version: str) -> None:
    core = [document for document in manifests.documents if document["apiVersion"] != "ray.io/v1"]
    assert len(core) > 20
    for document in core:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_pod_fits_the_schema_of_pods(manifests: Any, version: str) -> None:
    for pod in manifests.pods():
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"labels": pod.labels}, "spec": pod.spec}
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_field_of_kubernetes_own_kinds_is_refused(compose: Callable[..., Any]) -> None:
    deployment = compose("base").one("Deployment", "gateway")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


def test_every_kubectl_composes_the_same(
    kubectls: tuple[str, ...], compose: Callable[..., Any], manifests: Any
) -> None:
    if len(kubectls) == 1:
        pytest.skip(f"there is only one kubectl, {kubectls[0]}")
    told = {_without_hash(compose(manifests.folder, kubectl).documents) for kubectl in kubectls}
    assert len(told) == 1


def _without_hash(documents: tuple[dict[str, Any], ...]) -> str:
    """In one order; the hash in a ConfigMap's name depends on the version of kustomize."""
    lines = (json.dumps(document, sort_keys=True) for document in documents)
    return "\n".join(sorted(re.sub(r'"gateway-[a-z0-9]{10}"', '"gateway"', line) for line in lines))


def test_every_file_is_applied_by_some_kustomization_or_is_a_job() -> None:
    folder = ROOT / "infra/kuberay"
    named: set[Path] = set(folder.glob("jobs/*.yaml"))
    for kustomization in folder.rglob("kustomization.yaml"):
        tree = yaml.safe_load(kustomization.read_text())
        listed = [*tree.get("resources", []), *tree.get("patchesStrategicMerge", [])]
        listed += [patch["path"] for patch in tree.get("patchesJson6902", [])]
        listed += [name for made in tree.get("configMapGenerator", []) for name in made["files"]]
        named |= {kustomization, *(kustomization.parent / name for name in listed)}
    assert set(folder.rglob("*.yaml")) == named
