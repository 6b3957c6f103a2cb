"""The pages' commands, typed as they stand, page by page, in one folder and with one stack.

Other than for users are the ports, which may be taken here, what the pages' marks put in place of words, and demo.yaml,
whose trainings are shortened.
`AS_SHIPPED=1 pytest tests/e2e/test_docs.py -k quickstart` shortens nothing.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kintsugi.config import load_config
from kintsugi.imaging import Image, encode
from kintsugi.processes import free_ports

ROOT = Path(__file__).parents[2]
FIRST = ("quickstart.md", "operations.md", "README.md", "training.md", "endpoint.md")
"""Each goes on with what those before it have left."""
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RUN = re.compile(r'^<!-- (?:"[^"]+" )?run(?: with .*)? -->$', re.MULTILINE)
REST = [page.name for page in PAGES if page.name not in FIRST and RUN.search(page.read_text())]
AS_SHIPPED = bool(os.environ.get("AS_SHIPPED"))
SHARED = ("tune", "serve", "infra", "platform/kintsugi")
SMALL = (
    "data.crop=48", "model.base=8", "train.steps_per_epoch=5", "train.validation_images=3", "train.epochs=2",
    "train.workers=1", "loss.weights={defect: 0.3, ssim: 0.4, basic: 0.3, perceptual: 0, edge: 0}",
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
        (folder / "docs").mkdir()
        configs = Path(shutil.copytree(ROOT / "platform/configs", folder / "platform/configs"))
        for name in SHARED:
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        if not AS_SHIPPED:
            (configs / "demo.yaml").write_text(load_config(configs / "demo.yaml", SMALL).to_yaml())

    def begin(self) -> None:
        """Every page begins with images, and without what the one before made of them."""
        part = np.full((60, 80), 30000, np.uint16)
        (self.folder / "part.tiff").write_bytes(encode(Image(part, "tiff", 65535)))
        (self.folder / "lot").mkdir(exist_ok=True)
        for name in ("a", "b"):
            (self.folder / "lot" / f"{name}.png").write_bytes(encode(Image(part, "png", 65535)))
        for left in self.folder.glob("restored*"):
            left.unlink()

    def type(self, block: Any) -> None:
        """Run the lines of a block that are to be run, one after the other until one fails; or save the block."""
        for mark in [mark for mark in block.marks if mark.fate == "saved"]:
            (self.folder / mark.name).write_text(block.text)
            return
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
        for before, after in (*(() if AS_SHIPPED else mark.instead), *taken):
            line = line.replace(before, after)
        return line

    def down(self) -> None:
        command = [sys.executable, "-m", "kintsugi.cli", "down"]
        subprocess.run(command, cwd=self.folder, env=self._environment, check=True)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    yield desk
    desk.down()


@pytest.mark.parametrize("page", [*FIRST, *REST])
def test_what_a_page_tells_to_type_works(desk: Desk, page: str, blocks: Any) -> None:
    desk.begin()
    for block in [block for block in blocks if block.page == page and block.language in ("", "yaml")]:
        desk.type(block)
