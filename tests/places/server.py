"""An S3 server (moto) in a process of its own on loopback: ``python -m tests.places.server`` prints its port.

It ends when its standard input is closed, so also when the process that started it dies. moto looks whether an object
is there and stores it without a lock between, and sets an object's metadata when it can already be read: here requests
are answered one at a time, as a real object store answers those for one key.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUCKET = "lab"
PAGE = 7  # keys per page of a listing, so that a few keys need several pages


def environment(port: int) -> dict[str, str]:
    """What users set for a server of their own."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "hunter2-secret",
        "AWS_REGION": "us-east-1",
        "AWS_TIMEOUT": "2s",
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def serving(page: int = PAGE) -> Iterator[int]:
    """Port of a server with an empty `BUCKET`, whose listings have so many keys per page."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.places.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(page)},
        cwd=Path(__file__).parents[2],
    )
    with started:
        try:
            assert started.stdout
            port = int(started.stdout.readline())
            bucket = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(bucket, timeout=120).close()
            yield port
        finally:
            assert started.stdin
            started.stdin.close()
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()


def main() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    moto, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with lock:
            return list(moto(environ, start_response))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
