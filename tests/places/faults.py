"""A proxy on loopback that does to requests what networks and object stores do to them.

Whether the n-th request for a method and a key meets a fault follows from the seed alone, whatever the threads do.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Kind of fault: the methods that it can befall.
KINDS = {
    "500": ("GET", "HEAD", "PUT", "DELETE", "POST"),
    "503": ("GET", "HEAD", "PUT", "DELETE", "POST"),
    "409": ("PUT",),  # of create-only requests: another one is under way, and may fail
    "reset": ("GET", "HEAD", "PUT", "DELETE", "POST"),  # before the request is passed on
    "lost": ("PUT", "DELETE", "POST"),  # carried out, the connection reset before the answer
    "late 500": ("PUT", "DELETE", "POST"),  # carried out, answered with an error
    "hang": ("GET", "HEAD", "PUT", "DELETE", "POST"),  # no answer, nothing carried out
    "late hang": ("PUT", "DELETE", "POST"),  # no answer, carried out
    "truncated": ("GET",),  # the connection reset within the body
    "flipped": ("GET",),  # one bit of an object's body
}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class FaultProxy:
    """Stands before the server at a port; ``requests`` and ``faults`` count what came and what was done to it.

    ``rates`` gives the probability of each kind of fault for the methods that it can befall; ``ignore_conditions``
    makes every create-only request an ordinary one, as stores do that do not know them.
    """

    def __init__(self, upstream: int, rates: Mapping[str, float] | None = None, seed: int = 0) -> None:
        self.upstream, self.rates, self.seed = upstream, dict(rates or {}), seed
        self.ignore_conditions = False
        self.hang_s = 4.0
        self.requests, self.faults = Counter[str](), Counter[str]()
        self._forced: defaultdict[str, list[str]] = defaultdict(list)
        self._seen, self._lock = Counter[tuple[str, str]](), threading.Lock()
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.port = self._server.server_port

    def force(self, method: str, *kinds: str) -> None:
        """The next requests of a method meet these faults, one each."""
        self._forced[method] += kinds

    def choose(self, method: str, path: str, conditional: bool) -> str:
        """The fault that a request meets; empty for none."""
        with self._lock:
            self.requests[method] += 1
            self._seen[method, path] += 1
            kind = self._draw(method, path, conditional)
            self.faults.update([kind] if kind else [])
            return kind

    def _draw(self, method: str, path: str, conditional: bool) -> str:
        if self._forced[method]:
            return self._forced[method].pop(0)
        drawn = random.Random(f"{self.seed} {method} {path} {self._seen[method, path]}").random()
        listing = "list-type=" in path
        for kind, rate in self.rates.items():
            if method not in KINDS[kind] or (kind == "409" and not conditional) or (kind == "flipped" and listing):
                continue
            if drawn < rate:
                return kind
            drawn -= rate
        return ""

    def wait(self) -> None:
        """As long as a hang lasts, unless the proxy is stopped."""
        self._stopping.wait(self.hang_s)

    @contextmanager
    def running(self) -> Iterator[FaultProxy]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stopping.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def totals(self) -> str:
        """One line: requests and faults by kind."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.faults.items()))
        return f"{self.requests.total()} requests, {self.faults.total()} faults ({kinds})"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are what this is for."""


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            conditional = "If-None-Match" in self.headers
            kind = proxy.choose(self.command, self.path, conditional)
            if kind in ("500", "503", "409"):
                return self.send(int(kind), {}, _said(kind))
            if kind == "reset":
                return self.reset()
            if kind == "hang":
                proxy.wait()
                return self.reset()
            status, headers, content = self.forward(body)
            if kind == "late 500":
                return self.send(500, {}, _said("500"))
            if kind == "late hang":
                proxy.wait()
            if kind in ("lost", "late hang"):
                return self.reset()
            if kind == "truncated" and content:
                self.send(status, headers, content, sent=len(content) // 2)
                time.sleep(0.02)  # so that the half arrives before the reset
                return self.reset()
            if kind == "flipped" and content:
                at = random.Random(f"{proxy.seed} {self.path} {len(content)}").randrange(8 * len(content))
                flipped = bytearray(content)
                flipped[at // 8] ^= 1 << at % 8
                content = bytes(flipped)
            self.send(status, headers, content)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = answer  # noqa: N815

        def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            server = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
            try:
                passed = dict(self.headers.items())
                if proxy.ignore_conditions:
                    passed.pop("if-none-match", None), passed.pop("If-None-Match", None)
                server.request(self.command, self.path, body, passed)
                answer = server.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                server.close()

        def send(self, status: int, headers: Mapping[str, str], content: bytes, sent: int | None = None) -> None:
            self.send_response(status)
            size = next((v for k, v in headers.items() if k.lower() == "content-length"), str(len(content)))
            for name, value in headers.items():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", size if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:sent])

        def reset(self) -> None:
            """Close the connection as a crash does."""
            self.close_connection = True
            with suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    return Handler


def _said(kind: str) -> bytes:
    code = {"500": "InternalError", "503": "SlowDown", "409": "ConditionalRequestConflict"}[kind]
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
