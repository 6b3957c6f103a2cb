"""What a confined child does with a TIFF too large to be held: its rows go into a file, as plain numbers."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kintsugi.errors import ImageError
from kintsugi.restore.strips import TiffStrips
from kintsugi_serve.decoding.child import as_image_errors, receive_head, send

BAND_BYTES = 2**24
"""Of rows that are read at a time."""


def unpack(stream: socket.socket, source: int, sink: int) -> None:
    """Tell what the TIFF in the open file `source` is and, once somebody wants them, write its rows into `sink`."""
    job = json.loads(receive_head(stream))
    try:
        with as_image_errors():
            rows = _unpack(stream, Path(f"/proc/self/fd/{source}"), sink, job)
        answer: dict[str, Any] = {"rows": rows}
    except ImageError as error:
        answer = {"code": error.code, "sentence": str(error)}
    send(stream, json.dumps(answer).encode())


def _unpack(stream: socket.socket, source: Path, sink: int, job: dict[str, Any]) -> int:
    with TiffStrips(source, white_level=job["white_level"], max_pixels=job["max_pixels"]) as strips:
        height, width = strips.size

        def read(start: int, stop: int) -> NDArray[Any]:
            """Of a mask one truth value a pixel."""
            return strips.mask_rows(start, stop) if job["mask"] else strips.rows(start, stop).pixels

        like = read(0, 1)
        head = {"height": height, "width": width, "channels": like[0, 0].size, "dtype": like.dtype.name}
        send(stream, json.dumps({**head, "white_level": strips.white_level, **dict(strips.tags)}).encode())
        receive_head(stream)
        step = max(1, BAND_BYTES // like.nbytes)
        with os.fdopen(sink, "wb") as out:
            for top in range(0, height, step):
                out.write(read(top, min(height, top + step)).data)
        return height
