"""docs/kuberay.md names what is there."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs/kuberay.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL))


def test_every_path_in_the_docs_is_there() -> None:
    named = set(re.findall(r"infra/kuberay/[\w./-]*\w", BLOCKS))
    named |= {
        f"infra/kuberay/{path}" for path in re.findall(r"`((?:base|jobs|overlays|fault-tolerance)\b[\w./-]*)`", DOCS)
    }
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_object_that_a_command_names_is_made(compose: Any, jobs: Any) -> None:
    production = compose("overlays/prod")
    made = {f"{one['kind'].lower()}/{one['metadata']['name']}" for one in (*production.documents, *jobs)}
    # The operator's: from the names of ours.
    made |= {f"service/{production.one('RayCluster')['spec']['headGroupSpec']['headService']['metadata']['name']}"}
    made |= {f"job/{job['metadata']['name']}" for job in jobs}
    kinds = "service|deployment|raycluster|rayservice|rayjob|job"
    named = {"/".join(found) for found in re.findall(rf"\b({kinds})[/ ](kintsugi[a-z-]*|gateway|redis)\b", BLOCKS)}
    assert len(named) > 3
    assert named - made == set()


def test_the_ports_that_commands_forward_are_those_of_the_services(compose: Any) -> None:
    production = compose("overlays/prod")
    (gateway,) = production.one("Service", "gateway")["spec"]["ports"]
    assert f"service/gateway 8443:{gateway['port']}" in BLOCKS
    head = production.one("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    dashboard = next(port["containerPort"] for port in head["ports"] if port["name"] == "dashboard")
    assert f"service/kintsugi-training-head-svc {dashboard}" in BLOCKS


def test_the_node_groups_of_the_docs_are_those_that_production_looks_for(compose: Any) -> None:
    for pod in compose("overlays/prod").pods():
        for name, value in pod.spec.get("nodeSelector", {}).items():
            assert f"`{name}={value}`" in DOCS
        for toleration in pod.spec.get("tolerations", ()):
            assert toleration["key"] in DOCS
