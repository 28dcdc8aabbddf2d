from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from embcache.backbones.catalog import BACKBONES, load_backbone, weights_status
from embcache.backbones.weights import Published, check_digest, download, find_weights, locate_weights
from embcache.errors import WeightsError
from tests.refusal import refused

CONTENT = bytes(range(256)) * 20_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Answer:
    status: int = 200
    body: bytes = CONTENT
    length: int | None = len(CONTENT)  # what Content-Length claims
    kind: str = "application/octet-stream"


@dataclass
class Server:
    url: str
    answer: Answer = field(default_factory=Answer)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            self.send_response(state.answer.status)
            self.send_header("Content-Type", state.answer.kind)
            if state.answer.length is not None:
                self.send_header("Content-Length", str(state.answer.length))
            self.end_headers()
            self.wfile.write(state.answer.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state = Server(f"http://127.0.0.1:{http.server_port}/zoo/weights.pth")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def published(server: Server) -> Published:
    return Published(url=server.url, filename="weights.pth")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_download_arrives_whole_under_its_name_with_its_digest(published: Published, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "weights"
    path = download(published, folder)
    assert path == folder / "weights.pth"
    assert path.read_bytes() == CONTENT
    assert (folder / "weights.pth.sha256").read_text() == f"{DIGEST}  weights.pth\n"
    assert left_in(folder) == ["weights.pth", "weights.pth.sha256"]
    check_digest(path, DIGEST, published)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_a_download_is_what_the_umask_says(
    published: Published, tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        path = download(published, tmp_path)
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in (path, path.with_name("weights.pth.sha256"))}
    assert modes == {mode}


FAILURES = {
    "cut short": (Answer(body=CONTENT[:1000]), {}, "ended after 1,000 of 5,120,000 bytes"),
    "empty": (Answer(body=b"", length=0), {"size": 7}, "not the published 7"),
    "login page": (Answer(body=b"<html>", length=6, kind="text/html; charset=utf-8"), {}, "a web page"),
    "forbidden": (Answer(status=403), {}, "the server answers 403 Forbidden"),
    "another file": (Answer(), {"sha256": "0676ba61"}, "not the published 0676ba61"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_download_is_one_error_that_says_what_to_do_and_leaves_nothing(
    server: Server, published: Published, tmp_path: Path, failure: str
) -> None:
    server.answer, known, reason = FAILURES[failure]
    with pytest.raises(WeightsError, match=reason) as error:
        download(replace(published, **known), tmp_path)
    text = str(error.value)
    assert server.url in text
    assert "weights.pth" in text
    assert str(tmp_path) in text
    assert left_in(tmp_path) == []


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("where", ["127.0.0.1"])
def test_without_a_network_there_is_one_error_with_url_file_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    url = f"http://{where}:{closed_port()}/dino.pth"
    with pytest.raises(WeightsError) as error:
        locate_weights("dino", Published(url=url, filename="dino.pth"), home=tmp_path)
    text = str(error.value)
    assert url in text
    assert str(tmp_path / "weights" / "dino.pth") in text
    assert "curl -L -o dino.pth" in text
    assert left_in(tmp_path / "weights") == []


def test_two_processes_may_download_at_once(published: Published, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download(published, tmp_path), range(4)))
    assert all(path.read_bytes() == CONTENT for path in paths)
    assert left_in(tmp_path) == ["weights.pth", "weights.pth.sha256"]


# Where weights are looked for


def test_the_users_own_file_wins(server: Server, published: Published, tmp_path: Path) -> None:
    own = tmp_path / "own.pth"
    own.write_bytes(b"mine")
    assert locate_weights("dino", published, override=own, home=tmp_path) == own
    assert server.requests == []


def test_a_file_is_downloaded_once(server: Server, published: Published, home: Path, tmp_path: Path) -> None:
    first = locate_weights("dino", published)
    assert first == tmp_path / "weights" / "weights.pth"  # $EMBCACHE_WEIGHTS
    assert locate_weights("dino", published) == first
    assert len(server.requests) == 1


def test_a_file_of_another_size_than_the_published_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"short")
    with pytest.raises(WeightsError, match=r"expected: 86,728,949 bytes\n  found: 5 bytes"):
        find_weights(Published(filename="weights.pth", size=86_728_949), tmp_path)


def test_a_file_that_changed_since_its_download_is_refused(published: Published, tmp_path: Path) -> None:
    path = download(published, tmp_path)
    with refused(WeightsError, "weights-changed"):
        check_digest(path, hashlib.sha256(b"other").hexdigest(), published)
    with refused(WeightsError, "weights-changed"):
        check_digest(path, DIGEST, replace(published, sha256="ffff"))


def test_loading_refuses_a_published_name_with_other_content(home: Path, tmp_path: Path) -> None:
    source = locate_weights("effnet_lite0", BACKBONES["effnet_lite0"].weights)
    (tmp_path / "weights").mkdir()
    # The weights folder comes before the package, and lite1's file is whole, but it is not lite0's.
    other = locate_weights("effnet_lite1", BACKBONES["effnet_lite1"].weights)
    (tmp_path / "weights" / source.name).write_bytes(other.read_bytes())
    with refused(WeightsError, "weights-changed"):
        load_backbone("effnet_lite0")


def test_the_status_says_what_is_here_without_reading_it(home: Path, tmp_path: Path) -> None:
    assert weights_status("random") == weights_status("random:3") == "none needed"
    assert weights_status("dino") == "not here: downloaded when first used"
    assert weights_status("timm:resnet10t") == "not here: downloaded when first used"
    assert weights_status("effnet_lite0").startswith("here: ")
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, file in (("swav_fb", "swav_800ep_pretrain.pth.tar"), ("timm:hf-hub:org/net", "org--net.safetensors")):
        (folder / file).write_bytes(b"")
        assert weights_status(name) == f"here: {folder / file}"
    (folder / "dino_deitsmall8_pretrain.pth").write_bytes(b"part of it")
    assert weights_status("dino").startswith("not usable: ")
