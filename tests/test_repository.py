"""What holds for the repository as a whole."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kintsugi.config import load_config

ROOT = Path(__file__).parents[1]
ROOMS = ("platform", "tune", "serve")
CONFIGS = sorted((ROOT / "platform/configs").glob("*.yaml"))
# Joined here, so that this file does not hold what it looks for.
ONE_MACHINE = re.compile(
    "|".join(["/wo" + "rk/(?:main|shared)", "/ro" + r"ot/\.", "/op" + "t/py" + "pi", r"/home/(?!ray\b|ubuntu\b)\w"])
)
INDEX_HOST = re.compile(
    "|".join(
        [
            "py" + r"pi\.org",
            "files\\.python" + "hosted",
            r"pypi\.nvi" + "dia",
            r"download\.py" + r"torch\.org/whl",
            "/sim" + "ple/",
        ]
    )
)


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _files() -> list[Path]:
    """Every file that git tracks or would take in; without git, as in an unpacked archive, none can be told apart."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def _texts() -> list[tuple[str, str]]:
    contents = [(path.relative_to(ROOT).as_posix(), path.read_bytes()) for path in _files()]
    return [(name, content.decode(errors="replace")) for name, content in contents if b"\0" not in content]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_never_itself_a_package(room: str) -> None:
    assert (ROOT / room).is_dir()
    assert not (ROOT / room / "__init__.py").exists()


def test_no_folder_of_tests_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_standard_librarys_platform_is_found_from_the_root() -> None:
    code = "import platform; print(platform.system(), platform.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout.replace(sys.prefix, "")


def test_every_package_is_in_the_wheel() -> None:
    packages = _project()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    found = [p.parent.relative_to(ROOT).as_posix() for room in ROOMS for p in (ROOT / room).glob("*/__init__.py")]
    assert sorted(packages) == sorted(found)


def test_no_script_takes_the_name_of_one_of_rays() -> None:
    assert {"serve", "tune", "ray"}.isdisjoint(_project()["project"]["scripts"])


def test_no_module_takes_the_name_of_one_of_the_standard_library() -> None:
    names = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {"logging.py", "types.py", "profile.py", "platform.py"}.isdisjoint(names)


@pytest.mark.parametrize("target", ["help", "install", "demo", "test", "check", "format", "lock", "clean", "down"])
def test_the_makefile_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_make_target_is_phony_and_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    phony = {name for line in re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE) for name in line.split()}
    explained = set(re.findall(r"^([a-z][a-z-]*):.*## .", text, re.MULTILINE))
    assert targets == phony == explained


def test_make_alone_lists_the_targets() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make install" in done.stdout


def test_every_pin_of_the_lock_has_a_hash_and_none_has_a_url() -> None:
    pins = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    pins = [pin for pin in pins if not pin.startswith("#")]
    assert len(pins) > 100
    assert [pin.split("\n")[0] for pin in pins if not re.match(r"[a-z0-9._-]+==\S+ (; .* )?\\\n", pin)] == []
    assert [pin.split("\n")[0] for pin in pins if "--hash=sha256:" not in pin] == []
    assert [pin.split("\n")[0] for pin in pins if "://" in pin or " @ " in pin or "-index" in pin] == []


def test_the_lock_holds_every_dependency_and_what_builds_the_project() -> None:
    project, build = _project()["project"], _project()["build-system"]["requires"]
    locked = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"] + build + ["editables"]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= locked


@pytest.mark.parametrize("pattern", [ONE_MACHINE, INDEX_HOST], ids=["a path of one machine", "the host of an index"])
def test_no_file_holds(pattern: re.Pattern[str]) -> None:
    assert [(name, found[0]) for name, text in _texts() if (found := pattern.search(text))] == []


def test_the_patterns_find_what_they_are_for() -> None:
    assert ONE_MACHINE.search("open('/wo" + "rk/main/x')")
    assert INDEX_HOST.search("https://py" + "pi.org/")


def test_every_file_that_the_project_promises_is_there() -> None:
    project = _project()["project"]
    for name in (
        "README.md",
        "LICENSE",
        "Makefile",
        ".ci/run",
        "ray_cluster.yaml",
        project["readme"],
        *project["license-files"],
    ):
        assert (ROOT / name).is_file(), name
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_published_recipe_and_the_demo_are_among_the_configs() -> None:
    assert {"seed.yaml", "demo.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path: Path) -> None:
    load_config(path)


def test_the_distribution_and_the_package_have_one_version() -> None:
    from kintsugi import __version__

    assert _project()["project"]["version"] == __version__


def test_only_imaging_reads_or_writes_image_files() -> None:
    codecs = ("cv2.imdecode(", "cv2.imencode(", "cv2.imread(", "cv2.imwrite(")
    sources = [p for room in ROOMS for p in (ROOT / room).rglob("*.py")]
    offenders = [p.name for p in sources if any(codec in p.read_text() for codec in codecs)]
    assert offenders == ["imaging.py"]


def test_every_test_and_benchmark_that_the_documents_name_is_there() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = {path for document in documents for path in re.findall(r"\btests/[\w/]+(?:\.py)?", document.read_text())}
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
