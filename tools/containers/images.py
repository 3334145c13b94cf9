"""The images, built in an order in which each uses the layers of the one before."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from tools.containers.compose import Compose
from tools.terminal import say

BUILT: Final = ("keys", "preprocess", "trainer-cpu", "prometheus")
"""The services that build: the loader's image, the same with photographs, the trainer's, and Prometheus."""

WHEELS_PORT: Final = 8998
"""A fixed port: it becomes part of a build argument, and a changed argument would rebuild every layer."""


def build() -> None:
    """Build the images that `make docker` and `make docker-scale` run."""
    with local_wheels() as variables:
        compose = Compose(**variables)
        for service in BUILT:
            started_s = time.monotonic()
            compose.run("build", service)
            say(f"{service}: built in {time.monotonic() - started_s:.0f} s")


@contextmanager
def local_wheels() -> Iterator[dict[str, str]]:
    """Serve the folder of wheels that PIP_FIND_LINKS names over HTTP, since builds cannot see it.

    Yields Compose's variables, none if PIP_FIND_LINKS names no folder.
    """
    folder = Path(os.environ.get("PIP_FIND_LINKS") or "-")  # not Path(""), which is the working directory
    if not folder.is_dir():
        yield {}
        return
    address = ("127.0.0.1", WHEELS_PORT)  # builds share this machine's network: BUILD_NETWORK below
    with ThreadingHTTPServer(address, partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {"PIP_FIND_LINKS": f"http://127.0.0.1:{WHEELS_PORT}/", "BUILD_NETWORK": "host"}
        if any(folder.glob("torch-*+cpu-*.whl")):
            variables["TORCH_CPU_INDEX"] = ""  # the folder has torch's CPU build, so no index for it is needed
        try:
            yield variables
        finally:
            server.shutdown()  # ends serve_forever(); the `with` closes the socket


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""
