"""The pages' commands, typed as they stand, page by page, in one folder and with one stack.

Other than for users are the ports, which may be taken here, and demo.yaml, whose trainings are shortened.
`AS_SHIPPED=1 pytest tests/e2e/test_docs.py -k quickstart` shortens nothing.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest

from kintsugi.config import load_config
from kintsugi.data.synthetic import write_synthetic
from kintsugi.processes import free_ports

ROOT = Path(__file__).parents[2]
FIRST = ("README.md", "data.md", "quality.md", "search.md", "jobs.md")
LAST = ("endpoint.md", "operations.md", "security.md")
"""What asks the endpoint comes before the page that closes it with keys."""
PAGES = [
    page.name for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "<!-- run" in page.read_text()
]
ORDER = sorted(
    PAGES, key=lambda name: FIRST.index(name) - 9 if name in FIRST else LAST.index(name) + 9 if name in LAST else 0
)
SMALL = (
    "data.crop=48", "model.base=8", "train.steps_per_epoch=5", "train.validation_images=3", "train.epochs=2",
    "search.trials=2", "search.screened=1", "search.epochs=1", "search.screen_epochs=1",
)  # fmt: skip

TRACE = "PS4='+ after ${SECONDS} s: '"
LONGEST_S = 600
"""For a block, on a machine that is busy with something else."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


class Desk:
    """A folder with what the pages speak of: a checkout, images of parts; and where `kintsugi` keeps its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "KINTSUGI_"))}
        self._environment = ours | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KINTSUGI_CACHE": str(folder / "cache"),
        }
        self._lay_out()

    def _lay_out(self) -> None:
        for name in ("tune", "serve", "infra", "Makefile"):
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / "docs").mkdir()
        (self.folder / "platform").mkdir()
        (self.folder / "platform/kintsugi").symlink_to(ROOT / "platform/kintsugi")
        configs = Path(shutil.copytree(ROOT / "platform/configs", self.folder / "platform/configs"))
        if not os.environ.get("AS_SHIPPED"):
            (configs / "demo.yaml").write_text(load_config(configs / "demo.yaml", SMALL).to_yaml())
        parts = write_synthetic(self.folder / "parts", parts=20, size=96)
        image = cv2.imread(str(sorted((parts / "clean").iterdir())[0]), cv2.IMREAD_UNCHANGED)
        for name in ("part.png", "part.tiff"):
            cv2.imwrite(str(self.folder / name), image)

    def type(self, block: Any) -> None:
        """Run the lines of a block that are to be run, one after the other until one fails."""
        lines = [self._here(line, mark) for line in block.commands() if (mark := block.mark(line)).fate == "run"]
        if not lines:
            return
        with (self.folder / "typed.log").open("a+") as log:
            process = subprocess.Popen(
                ["bash", "-euxo", "pipefail", "-c", "\n".join([TRACE, *lines])], cwd=self.folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(timeout=LONGEST_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
            log.seek(0)
            assert code == 0, f"{block.place}\n{log.read()[-6000:]}"

    def _here(self, line: str, mark: Any) -> str:
        ports = " ".join(f"--{name}-port 0" for name in ("s3", "dashboard", "tensorboard", "ray"))
        taken = (
            ("kintsugi up", f"kintsugi up {ports} --endpoint-port {self.port}"),
            ("127.0.0.1:8000", f"127.0.0.1:{self.port}"),
        )
        for before, after in (*mark.instead, *taken):
            line = line.replace(before, after)
        return line

    def down(self) -> None:
        subprocess.run([sys.executable, "-m", "kintsugi.cli", "down"], env=self._environment, check=True)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One for all pages but those that begin and end with a stack of their own."""
    desk = Desk(tmp_path_factory.mktemp("desk"))
    yield desk
    desk.down()


@pytest.fixture
def own_desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.down()


@pytest.mark.parametrize("page", ORDER)
def test_what_a_page_tells_to_type_works(page: str, blocks: Any, request: pytest.FixtureRequest) -> None:
    desk = request.getfixturevalue("own_desk" if page == "quickstart.md" else "desk")
    for block in [block for block in blocks if block.page == page and block.language == ""]:
        desk.type(block)
