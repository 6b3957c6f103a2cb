"""Images/s of a loop that decodes, restores with two threads and encodes.

usage: serve_loop.py CHECKPOINT IMAGES SECONDS
"""

import itertools
import sys
import time
from pathlib import Path

import torch

from kintsugi import imaging
from kintsugi.restore.restorer import Restorer


def main(checkpoint: str, images: str, seconds: float) -> None:
    torch.set_num_threads(2)
    restorer = Restorer.from_checkpoint(Path(checkpoint))
    files = [file.read_bytes() for file in sorted(Path(images).glob("*.png"))]
    for file in files[:3]:
        restorer.restore(imaging.decode(file))
    begun = time.perf_counter()
    for done, file in enumerate(itertools.cycle(files)):
        spent = time.perf_counter() - begun
        if spent >= seconds:
            print(done / spent)
            return
        imaging.encode(restorer.restore(imaging.decode(file)).image)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
