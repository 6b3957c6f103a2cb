"""Who reaches whom, worked out from the network policies as a network plug-in would."""

import ipaddress
from collections.abc import Mapping
from typing import Any

import pytest

OWN = {"kubernetes.io/metadata.name": "kintsugi"}
OPERATOR = ({"kubernetes.io/metadata.name": "kuberay-system"}, {"app.kubernetes.io/name": "kuberay-operator"})
PROMETHEUS = ({"kubernetes.io/metadata.name": "monitoring"}, {"app.kubernetes.io/name": "prometheus"})
DNS = ({"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"})
STRANGER = ({"kubernetes.io/metadata.name": "other"}, {"app.kubernetes.io/component": "serving"})
Peer = tuple[Mapping[str, str], Mapping[str, str]]
"""Labels of the namespace, labels of the pod."""


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _is_peer(rule: Mapping[str, Any], other: Peer | str) -> bool:
    if isinstance(other, str):
        block = rule.get("ipBlock")
        address = ipaddress.ip_address(other)
        return block is not None and (
            address in ipaddress.ip_network(block["cidr"])
            and not any(address in ipaddress.ip_network(out) for out in block.get("except", ()))
        )
    if "ipBlock" in rule:
        return False  # of pods' addresses nothing is known: see test_addresses_are_for_what_is_outside
    namespace, labels = other
    near = _matches(rule["namespaceSelector"], namespace) if "namespaceSelector" in rule else namespace == OWN
    return near and _matches(rule.get("podSelector", {}), labels)


def _admits(rules: Any, side: str, other: Peer | str, port: int) -> bool:
    for rule in rules or ():
        peers, ports = rule.get(side), rule.get("ports")
        if (ports is None or port in {entry["port"] for entry in ports}) and (
            peers is None or any(_is_peer(peer, other) for peer in peers)
        ):
            return True
    return False


def _open(manifests: Any, direction: str, pod: Mapping[str, str], other: Peer | str, port: int) -> bool:
    chosen = [
        policy["spec"]
        for policy in manifests.of("NetworkPolicy")
        if direction in policy["spec"]["policyTypes"] and _matches(policy["spec"]["podSelector"], pod)
    ]
    side = {"Ingress": "from", "Egress": "to"}[direction]
    return not chosen or any(_admits(policy.get(direction.lower()), side, other, port) for policy in chosen)


def _labels(manifests: Any, owner: str) -> dict[str, str]:
    return next(pod.labels for pod in manifests.pods() if pod.owner == owner)


def _reaches(manifests: Any, source: str, target: str, port: int) -> bool:
    """Whether both ends let it pass."""
    start, end = _labels(manifests, source), _labels(manifests, target)
    out, in_ = _open(manifests, "Egress", start, (OWN, end), port), _open(manifests, "Ingress", end, (OWN, start), port)
    return out and in_


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("Deployment gateway", "RayService serve", 8000),
        ("RayJob kintsugi-train", "RayCluster head", 8265),
        ("RayJob kintsugi-tune", "RayCluster head", 8265),
        ("RayCluster cpu", "RayCluster head", 6379),
        ("RayCluster head", "RayCluster cpu", 23456),
        ("RayService serve", "RayService serve", 23456),
        ("RayService serve", "RayService head", 6379),
    ],
)
def test_what_must_meet_meets(manifests: Any, source: str, target: str, port: int) -> None:
    assert _reaches(manifests, source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("Deployment gateway", "RayService head", 8000),
        ("Deployment gateway", "RayService head", 8265),
        ("Deployment gateway", "RayService serve", 6379),
        ("Deployment gateway", "RayService serve", 8080),
        ("Deployment gateway", "RayCluster head", 8265),
        ("RayJob kintsugi-train", "RayService head", 8265),
        ("RayJob kintsugi-train", "RayCluster head", 6379),
        ("RayJob kintsugi-train", "RayCluster head", 10001),
        ("RayCluster cpu", "RayService head", 6379),
        ("RayCluster cpu", "RayService serve", 8000),
        ("RayService serve", "RayCluster head", 8265),
        ("RayService serve", "Deployment gateway", 8443),
    ],
)
def test_what_need_not_meet_does_not(manifests: Any, source: str, target: str, port: int) -> None:
    assert not _reaches(manifests, source, target, port)


def test_only_heads_reach_redis(compose: Any) -> None:
    manifests = compose("overlays/prod")
    allowed = {
        pod.owner
        for pod in manifests.pods()
        if pod.owner != "StatefulSet redis" and _reaches(manifests, pod.owner, "StatefulSet redis", 6379)
    }
    assert allowed == {"RayCluster head", "RayService head"}
    cleanup = {**_labels(manifests, "RayService head"), "ray.io/node-type": "redis-cleanup"}
    assert _open(manifests, "Egress", cleanup, (OWN, _labels(manifests, "StatefulSet redis")), 6379)
    assert _open(manifests, "Ingress", _labels(manifests, "StatefulSet redis"), (OWN, cleanup), 6379)


def test_other_namespaces_reach_what_is_theirs_to_ask_and_no_more(manifests: Any) -> None:
    doors = {
        (pod.owner, name, port)
        for pod in manifests.pods()
        for name, peer in (("operator", OPERATOR), ("prometheus", PROMETHEUS), ("stranger", STRANGER))
        for port in (6379, 8000, 8080, 8265, 8443, 10001)
        if _open(manifests, "Ingress", pod.labels, peer, port)
    }
    ray = {pod.owner for pod in manifests.pods() if pod.owner.startswith(("RayCluster", "RayService"))}
    gateway = {("Deployment gateway", name, 8443) for name in ("operator", "prometheus", "stranger")}
    heads = {("RayCluster head", "operator", 8265), ("RayService head", "operator", 8265)}
    assert doors == {(owner, "prometheus", 8080) for owner in ray} | heads | gateway


def test_every_pod_looks_up_names_and_only_rays_go_outside(manifests: Any) -> None:
    for pod in manifests.pods():
        ours = pod.owner.startswith(("RayCluster", "RayService"))
        assert _open(manifests, "Egress", pod.labels, DNS, 53), pod.owner
        assert _open(manifests, "Egress", pod.labels, "52.218.0.1", 443) == ours, pod.owner
        assert not _open(manifests, "Egress", pod.labels, "52.218.0.1", 80), pod.owner
        assert _open(manifests, "Egress", pod.labels, "10.0.0.1", 6443) == pod.owner.endswith(" head"), pod.owner
        assert not _open(manifests, "Egress", pod.labels, "169.254.169.254", 443), pod.owner


def test_addresses_are_for_what_is_outside(manifests: Any) -> None:
    """A block of addresses holds pods too; only ports that no pod of ours listens on are opened by one."""
    ports = {
        entry["port"]
        for policy in manifests.of("NetworkPolicy")
        for rule in policy["spec"].get("egress", ())
        if any("ipBlock" in peer for peer in rule["to"])
        for entry in rule["ports"]
    }
    listened = {
        port["containerPort"] for pod in manifests.pods() for c in pod.containers for port in c.get("ports", ())
    }
    assert ports == {443, 6443}
    assert not ports & listened


def test_every_policy_is_about_a_pod_that_runs_and_a_port_that_it_has(manifests: Any) -> None:
    pods = manifests.pods()
    for policy in manifests.of("NetworkPolicy"):
        spec, name = policy["spec"], policy["metadata"]["name"]
        assert any(_matches(spec["podSelector"], pod.labels) for pod in pods), name
        for side, rules in (("from", spec.get("ingress", ())), ("to", spec.get("egress", ()))):
            for rule in rules:
                peers = [peer for peer in rule.get(side, ()) if peer.keys() == {"podSelector"}]
                assert all(any(_matches(peer["podSelector"], pod.labels) for pod in pods) for peer in peers), name
                ends = [{"podSelector": spec["podSelector"]}] if side == "from" else peers
                for entry in rule.get("ports", ()) if ends else ():
                    assert _listens(pods, ends, entry["port"]), (name, entry)


def _listens(pods: Any, ends: Any, port: int) -> bool:
    """Whether some container of the chosen pods names the port."""
    return any(
        declared["containerPort"] == port
        for pod in pods
        if any(_matches(end["podSelector"], pod.labels) for end in ends)
        for container in pod.containers
        for declared in container.get("ports", ())
    )


def test_every_service_leads_to_a_port_of_a_pod(manifests: Any) -> None:
    for service in manifests.of("Service"):
        chosen = [pod for pod in manifests.pods() if _matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        names = {port["name"] for pod in chosen for c in pod.containers for port in c.get("ports", ())}
        assert chosen, service["metadata"]["name"]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_every_budget_counts_pods_that_run_and_can_be_kept(manifests: Any) -> None:
    """KubeRay's resources have no scale: a share, or maxUnavailable, would stop every drain for ever."""
    running = {
        "gateway": manifests.one("Deployment", "gateway")["spec"]["replicas"],
        "redis": 1,
        "training-head": 1,
        "serving-workers": sum(
            group["minReplicas"]
            for service in manifests.of("RayService")
            for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        ),
    }
    for budget in manifests.of("PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        assert spec.keys() == {"minAvailable", "selector"}
        assert any(_matches(spec["selector"], pod.labels) for pod in manifests.pods()), name
        assert isinstance(spec["minAvailable"], int)
        single = name in ("redis", "training-head")
        assert spec["minAvailable"] <= running[name] - (not single), name


def test_the_gateway_sends_to_the_service_that_kuberay_makes(manifests: Any) -> None:
    service = manifests.one("RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    port = next(entry["containerPort"] for entry in head["ports"] if entry["name"] == "serve")
    env = manifests.one("Deployment", "gateway")["spec"]["template"]["spec"]["containers"][0]["env"]
    upstreams = next(entry["value"] for entry in env if entry["name"] == "GATEWAY_UPSTREAMS")
    entries = [entry.split()[1] for entry in upstreams.split(";") if entry.strip()]
    assert entries == [f"{service['metadata']['name']}-serve-svc:{port}"] * 3


def test_no_two_heads_claim_the_same_service(manifests: Any) -> None:
    cluster = manifests.one("RayCluster")
    own = cluster["spec"]["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name")
    names = [own or f"{cluster['metadata']['name']}-head-svc"]
    names += [f"{service['metadata']['name']}-head-svc" for service in manifests.of("RayService")]
    names += [service["metadata"]["name"] for service in manifests.of("Service")]
    assert len(set(names)) == len(names)
