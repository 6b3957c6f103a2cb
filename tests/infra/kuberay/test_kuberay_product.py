"""What the manifests name of the product: application, settings, verbs, images, versions, time limits."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema
from typer._click.exceptions import UsageError
from typer.core import TyperGroup

from kintsugi.cli import build_app
from kintsugi.config import load_config
from kintsugi_serve.access.keys import new_key
from kintsugi_serve.app import bind
from kintsugi_serve.schemas import Args
from kintsugi_tune.space import load_space

ROOT = Path(__file__).parents[3]
EXPERIMENTS = ROOT / "infra/kuberay/base/experiments"
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
SHIPPED = ROOT / "serve/application.yaml"
THIRD_PARTY = {"nginx", "redis"}


@pytest.fixture
def config(manifests: Any) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(manifests.one("RayService")["spec"]["serveConfigV2"]))


@pytest.fixture
def args(config: ServeDeploySchema, tmp_path: Path) -> Args:
    """The application's arguments, with a real key file in place of the secret's."""
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  - tenant: line-3\n    sha256: {new_key()[1]}\n")
    keys.chmod(0o440)
    given = config.applications[0].args
    return Args.model_validate({"store": "s3://plant/kintsugi", **given, "keys_file": str(keys)})


def test_the_import_path_of_the_service_leads_to_a_builder(config: ServeDeploySchema) -> None:
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_service_is_the_shipped_one_with_other_values(config: ServeDeploySchema) -> None:
    shipped = yaml.safe_load(SHIPPED.read_text())
    (ours,), (theirs,) = config.applications, shipped["applications"]
    assert (ours.name, ours.route_prefix, ours.import_path) == tuple(
        theirs[key] for key in ("name", "route_prefix", "import_path")
    )
    assert ours.args.keys() <= theirs["args"].keys()
    assert ours.args["model"] == theirs["args"]["model"]


def test_the_real_builder_takes_the_services_arguments(args: Args) -> None:
    application = bind(args)
    assert application._bound_deployment.name == "Ingress"
    assert [key.tenant for key in args.settings().keys] == ["line-3"]
    assert args.settings().device == ("cuda" if args.num_gpus else "cpu")


def test_proxies_listen_where_kubernetes_looks_for_them(manifests: Any, config: ServeDeploySchema) -> None:
    assert (config.proxy_location, config.http_options.host) == ("EveryNode", "0.0.0.0")
    (worker,) = (pod for pod in manifests.pods() if pod.owner == "RayService serve")
    ports = {port["name"]: port["containerPort"] for port in worker.containers[0]["ports"]}
    assert ports["serve"] == config.http_options.port
    assert worker.containers[0]["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}


def test_the_key_file_lies_in_a_secret_wherever_the_application_may_be_built(
    manifests: Any, config: ServeDeploySchema
) -> None:
    path = Path(config.applications[0].args["keys_file"])
    pods = [pod for pod in manifests.pods() if pod.owner.startswith("RayService")]
    assert len(pods) == 2
    for pod in pods:
        (mount,) = (m for m in pod.containers[0]["volumeMounts"] if m["mountPath"] == str(path.parent))
        volume = next(volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"])
        assert mount["readOnly"] is True and volume["secret"]["secretName"] == "kintsugi-api-keys"


def test_heads_run_no_work(manifests: Any) -> None:
    for _, cluster in manifests.ray_clusters():
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert manifests.one("RayService")["spec"]["excludeHeadPodFromServeSvc"] is True


def test_the_ray_of_the_manifests_is_the_ray_that_is_installed(manifests: Any) -> None:
    assert {cluster["rayVersion"] for _, cluster in manifests.ray_clusters()} == {ray.__version__}


def test_an_upgrade_starts_a_second_cluster_and_the_autoscaler_is_the_second_one(manifests: Any) -> None:
    assert manifests.one("RayService")["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    for _, cluster in manifests.ray_clusters():
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2"
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize(("folder", "remembers"), [("base", False), ("overlays/dev", False), ("overlays/prod", True)])
def test_heads_remember_in_redis_in_production(compose: Any, folder: str, remembers: bool) -> None:
    composed = compose(folder)
    for _, cluster in composed.ray_clusters():
        assert ("gcsFaultToleranceOptions" in cluster) == remembers
    if remembers:
        redis = composed.one("Service", "redis")
        address = cluster["gcsFaultToleranceOptions"]["redisAddress"]
        assert address == f"{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"


def test_all_replicas_fit_into_the_pods_and_one_more_while_a_change_rolls_out(manifests: Any, args: Args) -> None:
    (group,) = manifests.one("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus, gpus = float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))
    in_a_pod = int(min(cpus // args.num_cpus, gpus // args.num_gpus if args.num_gpus else cpus // args.num_cpus))
    ingress = args.ingress_replicas * args.ingress_num_cpus
    assert group["minReplicas"] * cpus >= args.min_replicas * args.num_cpus + ingress
    assert group["minReplicas"] * in_a_pod >= args.min_replicas
    # A new replica starts before an old one goes: without room for it a change would never end.
    assert group["maxReplicas"] * in_a_pod >= args.max_replicas + 1
    assert group["maxReplicas"] * cpus >= (args.max_replicas + 1) * args.num_cpus + ingress + args.ingress_num_cpus


def test_whoever_waits_waits_longer_than_whom_it_waits_for(
    manifests: Any, config: ServeDeploySchema, args: Args
) -> None:
    gateway = dict(
        line.split("=", 1)
        for line in (ROOT / "infra/gateway/gateway.env").read_text().splitlines()
        if line.startswith("GATEWAY_")
    )
    answer_s = float(gateway["GATEWAY_ANSWER_TIMEOUT"].removesuffix("s"))
    assert args.timeout_s < answer_s
    assert args.timeout_s < (config.http_options.request_timeout_s or 0)
    assert manifests.one("RayService")["spec"]["rayClusterDeletionDelaySeconds"] > answer_s
    for owner, longest_s in (("Deployment gateway", answer_s), ("RayService serve", 0.0)):
        (pod,) = (pod for pod in manifests.pods() if pod.owner == owner)
        before_s = _before_stop_s(pod.containers[0])
        assert pod.spec["terminationGracePeriodSeconds"] > before_s + longest_s
    assert before_s > answer_s


def _before_stop_s(container: dict[str, Any]) -> float:
    command = " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
    return max(map(float, re.findall(r"\b(\d+)\b", command)))


def test_images_are_targets_of_the_dockerfile(manifests: Any) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE.read_text(), re.MULTILINE | re.IGNORECASE))
    assert _own_tags(manifests) <= targets


def test_only_our_images_and_two_others_are_used(manifests: Any) -> None:
    assert _own_tags(manifests) <= {"train-gpu", "serve-cpu", "serve-gpu"}


def _own_tags(manifests: Any) -> set[str]:
    images = {container["image"] for pod in manifests.pods() for container in pod.containers}
    parts = {tuple(image.rpartition("/")[2].split(":")) for image in images}
    assert {name for name, _ in parts} <= {"kintsugi", *THIRD_PARTY}
    return {tag for name, tag in parts if name == "kintsugi"}


def _parse(line: str) -> Any:
    """The context of a command line, as the real command line parses it; nothing runs."""
    program, *words = shlex.split(line)
    assert program == "kintsugi"
    context = build_app().make_context(program, words)
    while isinstance(context.command, TyperGroup):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        with context:
            context = command.make_context(name, rest, parent=context)
    return context


def test_the_entrypoints_of_jobs_are_command_lines_of_ours(jobs: Any) -> None:
    parsed = {job["metadata"]["name"]: _parse(job["spec"]["entrypoint"]).params for job in jobs}
    assert parsed["kintsugi-train"]["run"] == "kubernetes-train"
    assert parsed["kintsugi-tune"]["search"] == "kubernetes-tune"


@pytest.mark.parametrize("line", ["kintsugi trian a.yaml", "kintsugi train a --rnu x", "kintsugi tune a --trails 3"])
def test_a_misspelt_entrypoint_is_refused(line: str) -> None:
    with pytest.raises(UsageError):
        _parse(line)


def test_the_jobs_read_experiments_that_are_mounted_where_drivers_run(manifests: Any, jobs: Any) -> None:
    files = manifests.one("ConfigMap", "experiments")["data"]
    wanted = {Path(word) for job in jobs for word in job["spec"]["entrypoint"].split() if word.startswith("/")}
    assert {path.name for path in wanted} == files.keys()
    for pod in manifests.pods():
        if pod.owner.startswith("RayCluster"):
            mounts = {mount["mountPath"]: mount["name"] for mount in pod.containers[0]["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
            for path in wanted:
                assert volumes[mounts[str(path.parent)]]["configMap"]["name"] == "experiments"
    assert {job["spec"]["clusterSelector"]["ray.io/cluster"] for job in jobs} == {
        manifests.one("RayCluster")["metadata"]["name"]
    }


def test_the_experiments_are_valid_and_fit_the_cluster(compose: Any, jobs: Any) -> None:
    train = load_config(EXPERIMENTS / "train.yaml")
    load_space(EXPERIMENTS / "space.yaml")
    groups = {group["groupName"]: group for group in compose("base").one("RayCluster")["spec"]["workerGroupSpecs"]}
    limits = groups["train"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert train.train.gpu and train.train.workers <= groups["train"]["maxReplicas"]
    assert train.train.cpus_per_worker <= float(limits["cpu"])
    assert all(job["spec"]["entrypointNumCpus"] <= 1 for job in jobs)


def test_the_changes_that_the_docs_tell_for_a_cluster_without_gpus_fit_the_development_overlay(compose: Any) -> None:
    told = re.findall(r"--set (train\.\S+=[^\s`]+)", (ROOT / "docs/kuberay.md").read_text())
    train = load_config(EXPERIMENTS / "train.yaml", told).train
    (group,) = compose("overlays/dev").one("RayCluster")["spec"]["workerGroupSpecs"]
    cpus = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert not train.gpu
    # Beside the driver.
    assert train.workers * train.cpus_per_worker <= cpus * group["maxReplicas"] - 1


def test_every_variable_of_ours_is_one_that_the_product_reads(manifests: Any) -> None:
    code = "\n".join(path.read_text() for room in ("platform", "serve") for path in (ROOT / room).rglob("*.py"))
    names = [name for name in manifests.one("ConfigMap")["data"] if name.startswith("KINTSUGI_")]
    assert names
    assert [name for name in names if f'"{name}"' not in code] == []


def test_copies_of_data_stay_below_the_size_of_their_volume(manifests: Any) -> None:
    limit = float(manifests.one("ConfigMap")["data"]["KINTSUGI_CACHE_GB"])
    for pod in manifests.pods():
        if pod.owner in ("RayCluster cpu", "RayCluster train"):
            (scratch,) = (v for v in pod.spec["volumes"] if v["name"] == "scratch")
            assert limit * 1e9 < float(scratch["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30


def test_the_development_overlay_fits_8_cores_and_32_gib_while_it_upgrades(compose: Any) -> None:
    cpus = memory = 0.0
    for pod in compose("overlays/dev").pods():
        times = 2 if pod.owner.startswith("RayService") else 1
        for container in pod.containers:
            requests = container["resources"]["requests"]
            cpu = str(requests["cpu"])
            cpus += times * (float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu))
            memory += times * _bytes(requests["memory"])
        assert "nvidia.com/gpu" not in str(pod.spec)
    assert cpus <= 7 and memory <= 28 * 2**30


def _bytes(quantity: str) -> float:
    return float(quantity[:-2]) * {"Mi": 2**20, "Gi": 2**30}[quantity[-2:]]


def test_production_trains_by_spot_and_serves_on_demand(compose: Any) -> None:
    pods = {pod.owner: pod for pod in compose("overlays/prod").pods()}
    train, serve = pods["RayCluster train"], pods["RayService serve"]
    assert train.spec["nodeSelector"]["ray.io/market-type"] == train.labels["ray.io/market-type"] == "spot"
    assert {entry["key"] for entry in train.spec["tolerations"]} == {"nvidia.com/gpu", "ray.io/market-type"}
    assert serve.spec["nodeSelector"]["ray.io/market-type"] == serve.labels["ray.io/market-type"] == "on-demand"
    assert "ray.io/market-type" not in str(serve.spec["tolerations"])
    for pod in (train, serve):
        assert pod.containers[0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_nginx_takes_the_gateways_settings_as_they_are_mounted(
    manifests: Any, gateways: Any, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    if gateways.find_nginx() is None:
        pytest.skip("there is no nginx: run 'make nginx', or install it")
    mounted = tmp_path / "gateway"
    mounted.mkdir()
    (files,) = (one["data"] for one in manifests.of("ConfigMap") if one["metadata"]["name"].startswith("gateway-"))
    for name, text in files.items():
        (mounted / name).write_text(text)
        (mounted / name).chmod(0o555)
    (container,) = manifests.one("Deployment", "gateway")["spec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    # A name that resolves here, and a certificate that is here.
    given["GATEWAY_UPSTREAMS"] = given["GATEWAY_UPSTREAMS"].replace("kintsugi-serve-svc", "localhost")
    for name, path in zip(("tls.crt", "tls.key"), certificate, strict=True):
        given["GATEWAY_TLS"] = given["GATEWAY_TLS"].replace(f"/etc/kintsugi/tls/{name}", str(path))
    path = f"{Path(gateways.find_nginx()).parent}:{os.environ['PATH']}"
    command = [str(mounted / Path(container["command"][0]).name), "-t"]
    environment = {**given, "PATH": path, "GATEWAY_FOLDER": str(tmp_path / "work")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "/opt/kintsugi/gateway" in {mount["mountPath"] for mount in container["volumeMounts"]}
