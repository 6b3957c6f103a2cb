"""LitServe around decode and encode; runs in the peers' environment. usage: serve_peer_litserve.py PORT WORKERS"""

import sys

import litserve
from fastapi import Request, Response

from kintsugi import imaging


class Same(litserve.LitAPI):
    def setup(self, device: str) -> None:
        """There is no model."""

    def decode_request(self, request: Request) -> imaging.Image:  # which says: give me the parsed form
        return imaging.decode(request["image"].file.read())

    def predict(self, x: imaging.Image) -> imaging.Image:
        return x

    def encode_response(self, output: imaging.Image) -> Response:
        return Response(imaging.encode(output), media_type="image/png")


if __name__ == "__main__":
    server = litserve.LitServer(Same(), accelerator="cpu", workers_per_device=int(sys.argv[2]))
    server.run(host="127.0.0.1", port=sys.argv[1], log_level="error", generate_client_file=False, access_log=False)
