"""BentoML around decode and encode; runs in the peers' environment. usage: serve_peer_bentoml.py PORT WORKERS"""

import os
import sys
from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from kintsugi import imaging

WORKERS = "KINTSUGI_BENCH_WORKERS"
Png = Annotated[bytes, ContentType("image/png")]


@bentoml.service(workers=int(os.environ.get(WORKERS, "1")), logging={"access": {"enabled": False}})
class Same:
    @bentoml.api
    def restore(self, data: Png, /) -> Png:
        return imaging.encode(imaging.decode(data))


if __name__ == "__main__":
    os.environ[WORKERS] = sys.argv[2]
    here = Path(__file__)
    words = ["bentoml", "serve", f"{here.stem}:Same", "--host", "127.0.0.1", "--port", sys.argv[1]]
    os.execv(Path(sys.executable).parent / "bentoml", [*words, "--working-dir", str(here.parent)])
