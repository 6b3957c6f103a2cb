"""Run the steps of infra/docker/Dockerfile in folders of Debian, where there is no container engine.

    make image-check        as root, on Debian 12

The text that runs is the Dockerfile's own. For its base stands a Debian with the same Python, made by debootstrap from
the archive that apt uses here; each RUN is a chroot in namespaces of its own, each COPY a copy. Then
infra/docker/check-image runs as the image's user, on a read-only root without a network. Last, infra/aws/install-node
installs the same on a bare Debian, as ray_cluster.yaml has it do on a node.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
WORK = ROOT / ".kintsugi/image-check"
SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3.11", "python3.11-venv", "python3-distutils", "python3-lib2to3")
PASSED_ON = (
    "PIP_",
    "UV_",
    "SSL_CERT_FILE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Step:
    """One instruction: `RUN --mount=… text` is Step("RUN", ("--mount=…",), "text")."""

    word: str
    flags: tuple[str, ...]
    text: str

    def flag(self, name: str) -> str | None:
        values = [one.split("=", 1)[1] for one in self.flags if one.startswith(f"--{name}=")]
        return values[0] if values else None


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Image:
    """A folder and what an image says beside its files."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "0:0"
    folder: str = "/"


def instructions(text: str) -> Iterator[Step]:
    """The instructions of a Dockerfile, comments left out, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, rest = line.strip().split(None, 1)
        flags: list[str] = []
        while rest.startswith("--"):
            flag, rest = rest.split(None, 1)
            flags.append(flag)
        yield Step(word.upper(), tuple(flags), rest)


def stages(text: str) -> list[Stage]:
    """The stages of a Dockerfile, with the defaults of the ARGs before the first of them put in."""
    found: list[Stage] = []
    defaults: dict[str, str] = {}
    for step in instructions(text):
        if step.word == "ARG" and not found:
            defaults.update([step.text.split("=", 1)])
        elif step.word == "FROM":
            base, _, name = Template(step.text).substitute(defaults).partition(" AS ")
            found.append(Stage(name, base, ()))
        else:
            found[-1] = replace(found[-1], steps=(*found[-1].steps, step))
    return found


def variables(text: str, env: dict[str, str]) -> dict[str, str]:
    pairs = re.findall(r'(\w+)=("[^"]*"|\S*)', text)
    return {name: Template(value.strip('"')).safe_substitute(env) for name, value in pairs}


class Builder:
    """Builds stages as folders below `work`."""

    def __init__(self, work: Path, context: Path) -> None:
        self.work, self.context = work, context
        self.images: dict[str, Image] = {}

    def build(self, stage: Stage) -> Image:
        earlier = self.images.get(stage.base)
        image = replace(earlier, env=dict(earlier.env)) if earlier else Image(self._base(stage.name))
        changing = {step.word for step in stage.steps} & {"RUN", "COPY"}
        assert not (earlier and changing), f"{stage.name} would change the folder of {stage.base}"
        for step in stage.steps:
            print(f"[{stage.name}] {step.word} {step.text[:110]}", flush=True)
            image = self._apply(image, step)
        self.images[stage.name] = image
        return image

    def _apply(self, image: Image, step: Step) -> Image:
        match step.word:
            case "ENV":
                return replace(image, env=image.env | variables(step.text, image.env))
            case "WORKDIR":
                (image.root / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
                return replace(image, folder=step.text)
            case "USER":
                return replace(image, user=step.text)
            case "COPY":
                self._copy(image, step)
            case "RUN":
                run(image, ["/bin/sh", "-c", step.text], network=network_settings(), mounts=self._mounts(step))
            case "CMD":
                pass
            case other:
                raise SystemExit(f"error: {other} is not known here: add it to {Path(__file__).name}")
        return image

    def _copy(self, image: Image, step: Step) -> None:
        *sources, target = step.text.split()
        place = image.root / target.lstrip("/") if target.startswith("/") else image.root / image.folder[1:] / target
        stage = step.flag("from")
        for source in sources:
            if stage:
                # Hard links: nothing changes these files any more.
                command(["cp", "-al", f"{self.images[stage].root}{source}", str(place)])
                continue
            found = glob.glob(str(self.context / source))
            if len(found) != 1:
                raise SystemExit(f"error: COPY {source} finds {len(found)} files, not one: run 'make wheel'")
            shutil.copy(found[0], place)

    def _mounts(self, step: Step) -> list[tuple[str, str]]:
        target = re.search(r"type=cache,target=(\S+)", " ".join(step.flags))
        if target is None:
            return []
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return [(cache, target[1])]

    def _base(self, name: str) -> Path:
        """A fresh copy of Debian with Python, which is made once."""
        base, root = self.work / "base", self.work / f"stage-{name}"
        if not (base / "usr/bin/python3.11").exists() or not (base / "etc/resolv.conf").exists():
            shutil.rmtree(base, ignore_errors=True)
            wanted = ",".join(PACKAGES)
            command(["debootstrap", "--variant=minbase", f"--include={wanted}", SUITE, str(base), archive()])
            shutil.copy("/etc/resolv.conf", base / "etc/resolv.conf")
        command(["cp", "-a", str(base), str(root)])
        return root


def archive() -> str:
    """Where apt takes Debian from on this machine."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Created-By: Packages", "Component: main"],
        capture_output=True,
        text=True,
        check=True,
    )
    sites = [line.split()[0] for line in listed.stdout.splitlines() if line.split()[1] == SUITE]
    if not sites:
        raise SystemExit(f"error: apt knows no archive of Debian {SUITE} here: run this on Debian 12")
    return sites[0]


def network_settings() -> dict[str, str]:
    """How this machine reaches its package index, as build arguments would say it."""
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}


def shared_files(network: dict[str, str]) -> list[tuple[str, str]]:
    """pip's settings and the certificates that they name, at the same place inside."""
    names = {"/etc/pip.conf", network.get("PIP_CERT", ""), network.get("SSL_CERT_FILE", "")}
    return [(name, name) for name in sorted(names) if name and Path(name).is_file()]


def run(
    image: Image,
    arguments: Sequence[str],
    network: dict[str, str] | None = None,
    mounts: Sequence[tuple[str, str]] = (),
    read_only: bool = False,
) -> None:
    """Run in the image as its user, in namespaces of its own; without `network` there is only loopback."""
    script = ["set -e", f"mount --bind {image.root} {image.root}", f"cd {image.root}", "mount -t proc proc proc"]
    for device in ("null", "zero", "random", "urandom", "full"):
        script += [f"touch dev/{device}", f"mount --bind /dev/{device} dev/{device}"]
    script += ["mkdir -p dev/shm", "mount -t tmpfs -o mode=1777 tmpfs dev/shm", "mount -t tmpfs -o mode=1777 tmpfs tmp"]
    for source, target in (*mounts, *(shared_files(network) if network is not None else ())):
        inside = image.root / target[1:]
        inside.mkdir(parents=True, exist_ok=True) if Path(source).is_dir() else inside.parent.mkdir(
            parents=True, exist_ok=True
        )
        script += [f"test -e {inside} || touch {inside}", f"mount --bind {source} {inside}"]
    if read_only:
        home, (user, group) = image.env["HOME"], image.user.split(":")
        script += [
            f"mount -t tmpfs -o mode=0700,uid={user},gid={group} tmpfs .{home}",
            f"mount -o remount,bind,ro {image.root}",
        ]
    if network is None:
        script.append("ip link set lo up")
    script.append(
        f'cd {image.root}{image.folder}; exec chroot --userspec={image.user} {image.root} /usr/bin/env -i "$@"'
    )
    settings = [f"{name}={value}" for name, value in {"HOME": "/root", **image.env, **(network or {})}.items()]
    inside = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', image.folder, *arguments]
    spaces = ["--mount", "--pid", "--fork", "--kill-child", *(() if network is not None else ("--net",))]
    command(["unshare", *spaces, "/bin/sh", "-c", "\n".join(script), "sh", *settings, *inside])


def command(arguments: Sequence[str]) -> None:
    done = subprocess.run(arguments, check=False)
    if done.returncode:
        raise SystemExit(f"error: exit {done.returncode} of {' '.join(arguments)[:300]}")


def try_node(builder: Builder) -> None:
    """infra/aws/install-node, with the files that ray_cluster.yaml brings."""
    files = tuple(f"{name} ./" for name in ("requirements.lock", "pyproject.toml", "infra/aws/install-node"))
    steps = (
        Step("ENV", (), "UV_CACHE_DIR=/cache/uv PIP_CACHE_DIR=/cache/pip UV_LINK_MODE=copy"),
        Step("WORKDIR", (), "/node/dist"),
        Step("COPY", (), "dist/kintsugi-*.whl ./"),
        Step("WORKDIR", (), "/node"),
        *(Step("COPY", (), text) for text in files),
        Step("RUN", ("--mount=type=cache,target=/cache",), "bash /node/install-node"),
    )
    builder.build(Stage("node", "debian", steps))


def main() -> int:
    if os.geteuid() != 0:
        raise SystemExit("error: a chroot needs root: run it with sudo")
    missing = [name for name in ("debootstrap", "unshare", "ip") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"error: {' '.join(missing)} missing: apt-get install debootstrap util-linux iproute2")
    WORK.mkdir(parents=True, exist_ok=True)
    for old in WORK.glob("stage-*"):
        shutil.rmtree(old)
    builder = Builder(WORK, ROOT)
    found = stages(DOCKERFILE.read_text())
    for stage in found:
        builder.build(stage)
    for stage in found[2:]:
        print(f"== {stage.name}", flush=True)
        check = (str(ROOT / "infra/docker/check-image"), "/usr/local/bin/check-image")
        lock = (str(ROOT / "requirements.lock"), "/usr/local/share/requirements.lock")
        run(builder.images[stage.name], ["check-image"], mounts=[check, lock], read_only=True)
    print("== a node of ray_cluster.yaml", flush=True)
    try_node(builder)
    for used in WORK.glob("stage-*"):
        shutil.rmtree(used)
    return 0


if __name__ == "__main__":
    sys.exit(main())
