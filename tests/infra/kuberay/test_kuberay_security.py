"""What every container may do, what it can reach of the cluster's secrets, and what it may use up."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs/kuberay.md"
API_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
ALLOWED_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


def test_no_container_is_root_or_privileged_or_keeps_a_capability(manifests: Any) -> None:
    for pod in manifests.pods():
        context = pod.spec["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, 10001, 10001), pod.owner
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), pod.owner
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, (pod.owner, container["name"])
            assert not any("hostPort" in port for port in container.get("ports", ()))


def test_the_namespace_refuses_pods_that_could_do_more(manifests: Any) -> None:
    labels = manifests.one("Namespace")["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}
    for pod in manifests.pods():
        kinds = {key for volume in pod.spec.get("volumes", ()) for key in volume if key != "name"}
        assert kinds <= ALLOWED_VOLUMES, pod.owner


def test_everything_is_in_the_one_namespace(manifests: Any) -> None:
    outside = [d["metadata"]["name"] for d in manifests.documents if d["metadata"].get("namespace") != "kintsugi"]
    assert outside == ["kintsugi"]  # the namespace itself


def test_every_container_has_requests_and_limits(manifests: Any) -> None:
    for pod in manifests.pods():
        for container in pod.containers:
            requests, limits = (container["resources"][part] for part in ("requests", "limits"))
            assert {"cpu", "memory", "ephemeral-storage"} <= requests.keys() == limits.keys()
            # Memory that is promised to others is taken by killing; GPUs cannot be promised in part.
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
            if container["name"].startswith("ray-"):
                assert requests["memory"] == limits["memory"], (pod.owner, container["name"])


def test_what_a_read_only_container_writes_to_is_mounted_and_bounded(manifests: Any) -> None:
    for pod in manifests.pods():
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        claimed = {"data"} if pod.owner.startswith("StatefulSet") else set()
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} <= volumes.keys() | claimed, pod.owner
            if "redis" not in pod.owner:
                assert "/tmp" in mounts, (pod.owner, container["name"])
            home = {entry["name"]: entry.get("value") for entry in container.get("env", ())}.get("HOME")
            assert home in mounts or container["name"] in ("nginx", "redis"), (pod.owner, container["name"])
        assert all("sizeLimit" in v["emptyDir"] for v in volumes.values() if "emptyDir" in v), pod.owner


def test_only_the_autoscaler_gets_a_token_of_the_kubernetes_api(manifests: Any) -> None:
    assert all(account["automountServiceAccountToken"] is False for account in manifests.of("ServiceAccount"))
    for pod in manifests.pods():
        assert pod.spec["automountServiceAccountToken"] is False, pod.owner
        given = {c["name"] for c in pod.containers for mount in c["volumeMounts"] if mount["mountPath"] == API_TOKEN}
        assert given == ({"autoscaler"} if pod.owner.endswith("head") else set()), pod.owner


def test_every_pod_runs_as_an_account_that_is_made_here(manifests: Any) -> None:
    accounts = {account["metadata"]["name"] for account in manifests.of("ServiceAccount")}
    submitters, others = [], []
    for pod in manifests.pods():
        (submitters if pod.owner.startswith("RayJob") else others).append(pod.spec.get("serviceAccountName"))
    assert set(others) <= accounts
    assert set(submitters) == {None}


def test_every_ray_cluster_asks_for_the_token(manifests: Any) -> None:
    clusters = manifests.ray_clusters()
    assert [cluster["authOptions"] for _, cluster in clusters] == [
        {"mode": "token", "secretName": "kintsugi-ray-token"}
    ] * 2


def _secrets(tree: Any) -> set[str]:
    """The names of all secrets that a document refers to."""
    if isinstance(tree, list):
        return set().union(*map(_secrets, tree))
    if not isinstance(tree, dict):
        return set()
    found = set().union(*(_secrets(value) for value in tree.values()))
    if isinstance(reference := tree.get("secretKeyRef"), dict):
        found.add(reference["name"])
    return found | ({tree["secretName"]} if "secretName" in tree else set())


def test_secrets_are_referred_to_and_never_kept_here(manifests: Any) -> None:
    assert manifests.of("Secret") == []
    for pod in manifests.pods():
        for container in pod.containers:
            for entry in container.get("env", ()):
                assert "value" not in entry or not re.search("PASSWORD|TOKEN|SECRET|KEY", entry["name"])
    for settings in manifests.of("ConfigMap"):
        assert not [name for name in settings["data"] if re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY", name)]


def test_the_docs_tell_how_to_make_every_secret(manifests: Any) -> None:
    wanted = set().union(*map(_secrets, manifests.documents))
    told = set(re.findall(r"kubectl create secret (?:generic|tls) ([a-z-]+)", DOCS.read_text()))
    assert wanted - told == set()
    assert {"kintsugi-ray-token", "kintsugi-api-keys", "kintsugi-tls"} <= wanted


def test_each_secret_has_the_key_that_its_reader_looks_for(manifests: Any) -> None:
    docs = DOCS.read_text()
    assert "kubectl create secret generic kintsugi-ray-token --from-literal=auth_token=" in docs
    assert "kubectl create secret generic kintsugi-api-keys --from-file=keys.yaml" in docs
    (nginx,) = (pod for pod in manifests.pods() if pod.owner == "Deployment gateway")
    tls = next(entry["value"] for entry in nginx.containers[0]["env"] if entry["name"] == "GATEWAY_TLS")
    assert set(re.findall(r"/etc/kintsugi/tls/(\S+);", tls)) == {"tls.crt", "tls.key"}


def test_a_key_file_in_a_secret_is_readable_and_not_changeable_by_its_group(manifests: Any) -> None:
    modes = [
        (volume["secret"]["defaultMode"], pod.spec["securityContext"]["fsGroup"])
        for pod in manifests.pods()
        for volume in pod.spec.get("volumes", ())
        if "secret" in volume
    ]
    assert modes
    assert set(modes) == {(0o440, 10001)}


def test_no_image_is_whatever_is_newest(manifests: Any) -> None:
    for pod in manifests.pods():
        for container in pod.containers:
            assert re.fullmatch(r"(?:[a-z0-9./-]+/)?[a-z]+:(?!latest)[a-z0-9.-]+", container["image"])


@pytest.mark.parametrize("folder", ["overlays/prod"])
def test_production_names_a_role_for_every_account_that_reaches_the_store(compose: Any, folder: str) -> None:
    for account in compose(folder).of("ServiceAccount"):
        name = account["metadata"]["name"]
        roles = account["metadata"].get("annotations", {}).get("eks.amazonaws.com/role-arn")
        assert (roles is None) == (name in ("kintsugi-gateway", "kintsugi-redis")), name
