"""Where bytes are kept under keys: a folder on disk, or a prefix of an object store.

A store needs five things of a place, and one of them is exact: of several writers that create one key, exactly one
succeeds. Object stores offer this as conditional writes; some ignore the condition without a word, so `probe` tries
it. What a client is answered can be wrong: after a lost answer, or a 409, it reads "exists already" of its own object
or of none, and a flipped bit is returned as good. So `put_new` reads back, and each object carries a checksum of ours.

Credentials come from the provider chain of the system alone: environment, instance, or ``AWS_PROFILE``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from embcache import io as disk
from embcache.errors import CorruptStoreError, StoreError, UsageError
from embcache.log import log
from embcache.sealed import crc32c

SCHEMES = ("s3", "gs", "az", "memory")
_URL = re.compile(rf"({'|'.join(SCHEMES)}):(?:/+(.*))?", re.DOTALL)
_BUCKET = re.compile(r"[\w.-]+")
# The machine's metadata, which is asked for credentials where the environment has none.
_METADATA = re.compile("/latest/(api/token|meta-data)")
_CHECKSUM = "crc32c"  # of the metadata that every object of ours has
# Seconds before an operation is tried again, after the client itself has given up on retries.
_PAUSES = (0.1, 0.3, 1.0, 3.0, 5.0)
_RACERS = 4
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|k|M|G|T)B?", re.IGNORECASE)
_STAGED = re.compile(r"-[0-9a-f]{16}(\.gone)?$")  # how names end of what is written and not yet in place

_T = TypeVar("_T")


class Entry(NamedTuple):
    """One object of a listing."""

    key: str
    size: int
    etag: str  # another one for other bytes, as far as the place knows
    modified: float  # seconds since the epoch, by the place's clock

    @property
    def version(self) -> str:
        """Another text for another object, also where its bytes, of which the tag may be, were there before."""
        return f"{self.etag} {self.modified}"


class Place(ABC):
    """Bytes under keys, ``a/b/c``, which are UTF-8 without empty parts, ``.`` or ``..``."""

    url: str  # as a user types it; holds no credentials

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Create an object; False where one with other bytes has the key. One of several racing writers succeeds."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write an object, whole, whatever was there: under a key of this content alone, or the last writer wins."""

    @abstractmethod
    def get(self, key: str, most: int | None = None) -> bytes:
        """The bytes of an object, checked; FileNotFoundError where there is none. More than ``most`` are not read."""

    @abstractmethod
    def list(self, prefix: str = "", after: str = "") -> Iterator[Entry]:
        """Objects under a folder-like prefix, whose keys are greater than ``after``, ascending."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""


def check_key(key: str) -> str:
    """The key; ValueError where it could mean another one."""
    if not key or any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key or "\\" in key:
        raise ValueError(f"{key!r} is no key")
    return key


class DiskPlace(Place):
    """A folder on disk; objects are files, written by `embcache.io`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def put_new(self, key: str, data: bytes) -> bool:
        """See `Place.put_new`: a file is linked to its name, which fails where the name is taken."""
        path = self.folder / check_key(key)
        disk.make_folder(path.parent)
        return disk.create_exclusive(path, data, staging=path.parent) or self.get(key) == data

    def put(self, key: str, data: bytes) -> None:
        """See `Place.put`."""
        disk.replace_file(self.folder / check_key(key), data)

    def get(self, key: str, most: int | None = None) -> bytes:
        """See `Place.get`."""
        try:
            if most is not None:
                _check_size(f"{self.url}/{key}", (self.folder / check_key(key)).stat().st_size, most)
            return disk.read_regular(self.folder / check_key(key))
        except NotADirectoryError as error:
            raise FileNotFoundError(errno.ENOENT, "no such file", key) from error

    def list(self, prefix: str = "", after: str = "") -> Iterator[Entry]:
        """See `Place.list`."""
        top = self.folder / prefix
        found = [path for path in top.rglob("*") if path.is_file() and not _STAGED.search(path.name)]
        for key, path in sorted((path.relative_to(self.folder).as_posix(), path) for path in found):
            if key > after:
                state = path.stat()
                yield Entry(key, state.st_size, f"{state.st_mtime_ns}-{state.st_ino}", state.st_mtime)

    def delete(self, key: str) -> None:
        """See `Place.delete`."""
        disk.discard(self.folder / check_key(key))


class ObjectPlace(Place):
    """A prefix of an object store, by obstore; ``store`` is one of its stores."""

    def __init__(self, store: Any, url: str) -> None:
        self._store, self.url = store, url

    def put_new(self, key: str, data: bytes) -> bool:
        """See `Place.put_new`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError

        def attempt() -> bool:
            failed = None
            try:
                obstore.put(self._store, check_key(key), data, mode="create", attributes=_attributes(data))
                return True
            except (AlreadyExistsError, PreconditionError):
                pass  # of another writer; or ours, whose answer was lost; or none, after a 409
            except GenericError as error:
                failed = error  # it may have been written, or may still be
            try:
                return self._read(key) == data
            except FileNotFoundError as error:
                raise failed or GenericError("the key is taken, and has no object") from error

        return self._retried(attempt, key)

    def put(self, key: str, data: bytes) -> None:
        """See `Place.put`."""
        import obstore

        def attempt() -> None:
            # In one request: with its parts sent one by one, an upload that is cut short stays as hidden parts.
            obstore.put(self._store, check_key(key), data, use_multipart=False, attributes=_attributes(data))

        self._retried(attempt, key)

    def get(self, key: str, most: int | None = None) -> bytes:
        """See `Place.get`."""
        return self._retried(lambda: self._read(key, most), key, absent=True)

    def _read(self, key: str, most: int | None = None) -> bytes:
        import obstore

        result = obstore.get(self._store, check_key(key))
        size = result.meta["size"]
        if most is not None:
            _check_size(f"{self.url}/{key}", size, most)
        data = bytes(result.bytes())
        checksum = result.attributes.get(_CHECKSUM, crc32c(data))
        if (len(data), crc32c(data)) != (size, checksum):
            raise _DamagedError(f"{len(data)} bytes, crc32c {crc32c(data)}; not {size} bytes, crc32c {checksum}")
        return data

    def list(self, prefix: str = "", after: str = "") -> Iterator[Entry]:
        """See `Place.list`."""
        import obstore

        def page(last: str) -> list[Entry]:
            for chunk in obstore.list(self._store, prefix.rstrip("/") or None, offset=last or None, chunk_size=1000):
                return [
                    Entry(each["path"], each["size"], each["e_tag"] or "", each["last_modified"].timestamp())
                    for each in chunk
                ]
            return []

        # Page by page, so that one that fails is asked for again.
        while entries := self._retried(partial(page, after), prefix):
            yield from entries
            after = entries[-1].key

    def delete(self, key: str) -> None:
        """See `Place.delete`."""
        import obstore

        def attempt() -> None:
            try:
                obstore.delete(self._store, check_key(key))
            except FileNotFoundError:
                return

        self._retried(attempt, key)

    def _no_bucket(self, error: Exception) -> StoreError:
        return StoreError(
            "there is no such bucket", code="place-missing", found=_first_line(error), where=self.url,
            fix="check the address, or create the bucket",
        )  # fmt: skip

    def _retried(self, attempt: Callable[[], _T], key: str, *, absent: bool = False) -> _T:
        """What ``attempt`` returns, once it does; with ``absent``, FileNotFoundError is an answer."""
        from obstore.exceptions import (
            BaseError,
            InvalidPathError,
            NotSupportedError,
            PermissionDeniedError,
            UnauthenticatedError,
        )

        for pause in (*_PAUSES, None):
            try:
                return attempt()
            except FileNotFoundError as error:
                if absent:
                    raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.url}/{key}") from error
                raise self._no_bucket(error) from error
            except (PermissionDeniedError, UnauthenticatedError, NotSupportedError) as error:
                raise StoreError(
                    "the object store refuses a request", code="place-refused", found=_first_line(error),
                    where=f"{self.url}/{key}", fix="check the credentials of this machine and the rights on the bucket",
                ) from error  # fmt: skip
            except InvalidPathError as error:
                raise StoreError(
                    "an object has a key that is no path", code="place-foreign", found=_first_line(error),
                    where=self.url, expected="keys without empty parts, . and ..",
                    fix="remove this object, which embcache did not write, or use another prefix",
                ) from error  # fmt: skip
            except _DamagedError as error:
                if pause is None:
                    raise CorruptStoreError(
                        "an object is not the one that was written", code="place-damaged", found=str(error),
                        where=f"{self.url}/{key}", fix="embcache verify --repair, for features; else restore it",
                    ) from error  # fmt: skip
            except (BaseError, OSError) as error:
                if "NoSuchBucket" in str(error):  # to a listing
                    raise self._no_bucket(error) from error
                if pause is None and _METADATA.search(str(error)):
                    raise StoreError(
                        "there are no credentials for the object store", code="place-refused",
                        found=_first_line(error), where=f"{self.url}/{key}",
                        fix="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for "
                        "a public bucket",
                    ) from error  # fmt: skip
                if pause is None:
                    raise StoreError(
                        "the object store does not answer as it should", code="place-unavailable",
                        found=_first_line(error), where=f"{self.url}/{key}",
                        fix="check the address and the network, then run the same command: what is committed stays",
                    ) from error  # fmt: skip
                log.debug("%s/%s: tried again: %s", self.url, key, _first_line(error))
            time.sleep(pause or 0)
        raise AssertionError("the last attempt returns or raises")


class _DamagedError(Exception):
    """An object's bytes are not those that its checksum was taken from."""


def _check_size(where: str, size: int, most: int) -> None:
    if size > most:
        raise StoreError(
            "an object is too large to be read whole", code="place-too-large", expected=f"at most {most:,} bytes",
            found=f"{size:,} bytes", where=where, fix="check what was stored under this address",
        )  # fmt: skip


def _attributes(data: bytes) -> dict[str, str]:
    return {_CHECKSUM: crc32c(data)}


def _first_line(error: Exception) -> str:
    """What went wrong, without the addresses and headers that follow."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def is_url(text: object) -> bool:
    """Whether something names a place in an object store; ``Path`` makes ``s3:/bucket`` of ``s3://bucket``."""
    return isinstance(text, str | os.PathLike) and _URL.fullmatch(os.fspath(text)) is not None


def as_url(text: object) -> str:
    """``s3://bucket/prefix`` from any spelling of it, without a slash at its end; other texts as they are."""
    match = _URL.fullmatch(str(text))
    if match is None:
        return str(text)
    return f"{match[1]}://{(match[2] or '').strip('/')}"


def refuse_url(path: object, expected: str = "a folder, or s3://, gs:// or az:// with BUCKET/PREFIX") -> None:
    """Raise a UsageError for an address where a folder of this machine is meant: one of that name would be made."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise UsageError(
            "an address is not a folder", code="place-address", expected=expected, found=_public(str(path)),
            fix="name a folder of this machine",
        )  # fmt: skip


def _public(url: str) -> str:
    """An address without what may be a secret."""
    return re.sub(r"[?#].*", "?…", re.sub("//.*@", "//…@", url), flags=re.DOTALL)


def cache_dir() -> Path:
    """Folder of all mirrors: ``$EMBCACHE_CACHE_DIR``, else ``~/.cache/embcache-places``."""
    folder = os.environ.get("EMBCACHE_CACHE_DIR") or Path.home() / ".cache" / "embcache-places"
    refuse_url(folder, "a folder of this machine")
    return Path(folder).expanduser()


def cache_bytes() -> int:
    """Bytes of features that a mirror keeps: ``$EMBCACHE_CACHE_SIZE`` (``200GB``), else 100 GB."""
    text = os.environ.get("EMBCACHE_CACHE_SIZE") or "100GB"
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            "the size of the cache cannot be read", code="cache-size", expected="a number of bytes such as 200GB",
            found=text, where="--cache-size, EMBCACHE_CACHE_SIZE", fix="--cache-size 200GB",
        )  # fmt: skip
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " "))


def split_url(url: str, *, whole: bool = False) -> tuple[str, str]:
    """The bucket of a URL, ``s3://bucket``, and the key, which a ``whole`` bucket may lack; `UsageError` for others."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    with suppress(ValueError):
        if _BUCKET.fullmatch(bucket) and ((whole and not key) or check_key(key)):
            return f"{scheme}://{bucket}", key
    raise UsageError(
        "the address of an object store cannot be used", code="place-address",
        expected=f"{scheme}://BUCKET/KEY without empty parts, . and .., and without credentials",
        found=_public(url),
        fix="check the address; an endpoint is named by AWS_ENDPOINT_URL, and credentials by the environment",
    )  # fmt: skip


@cache
def open_place(url: str) -> Place:
    """The place of a URL (``s3://bucket/prefix``, ``gs://``, ``az://``, ``memory://``), or of a folder's path.

    Raises
    ------
    UsageError
        obstore is not installed, or the URL cannot be used.
    """
    if not is_url(url):
        return DiskPlace(Path(url))
    url = as_url(url)
    if marks := set("?#%") & set(split_url(url, whole=True)[1]):  # which mean other things in URLs, tokens too
        raise UsageError(
            "the address of an object store cannot be used", code="place-address", found=_public(url),
            expected=f"no {' '.join(sorted(marks))} in it", fix="use another prefix",
        )  # fmt: skip
    try:
        import obstore.store as stores
    except ImportError as error:
        raise UsageError(
            "object stores need the extra 'cloud'", code="cloud-missing", found=url, fix="pip install 'embcache[cloud]'"
        ) from error
    if url.startswith("memory:"):
        return ObjectPlace(stores.MemoryStore(), url)
    endpoint = next(filter(None, map(os.environ.get, ENDPOINTS)), "") if url.startswith("s3:") else ""
    if (endpoint and not re.match(r"https?://", endpoint)) or (endpoint.startswith("http:") and not _plain_http()):
        raise UsageError(
            "the endpoint of the object store cannot be used", code="place-address", found=_public(endpoint),
            where="AWS_ENDPOINT_URL", expected="https://HOST, or http://HOST:PORT with AWS_ALLOW_HTTP=true",
            fix="AWS_ALLOW_HTTP=true, for a server without TLS" if "//" in endpoint else "add https:// or http://",
        )  # fmt: skip
    try:
        options: dict[str, Any] = {"client_options": _client(), "retry_config": _retries()}
        if url.startswith("s3:") and os.environ.get("AWS_PROFILE"):
            from obstore.auth.boto3 import Boto3CredentialProvider

            options["credential_provider"] = Boto3CredentialProvider()
        return ObjectPlace(stores.from_url(url, **options), url)
    except ImportError as error:
        raise UsageError(
            "AWS_PROFILE needs boto3", code="cloud-missing", found=_first_line(error), fix="pip install boto3"
        ) from error
    except Exception as error:  # obstore raises its own kinds, ValueError and others
        names = ", ".join(name for name in os.environ if re.match("AWS_|GOOGLE_|AZURE_", name))
        raise UsageError(
            "the object store cannot be opened with this address and these variables", code="place-address",
            found=_first_line(error), where=url, expected="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX",
            fix=f"check the variables of this shell: {names}" if names else "check the address",
        ) from error  # fmt: skip


def bring_file(url: disk.PathLike) -> Path:
    """A file of an object store, copied here; copied anew where the object is another one."""
    folder, _, name = as_url(url).rpartition("/")
    place = open_place(folder)
    entry = next((each for each in place.list(after=name[:-1]) if each.key >= name), None)
    if entry is None or entry.key != name:
        raise UsageError("there is no such object", code="object-not-found", where=as_url(url), fix="check the address")
    digits = hashlib.sha256(f"{folder}\0{entry.etag}\0{entry.size}".encode()).hexdigest()[:16]
    path = cache_dir() / "files" / digits / name
    if not path.exists():
        disk.cache_file(path, place.get(name))
    return path


def _client() -> dict[str, Any]:
    # Options given here replace those of the environment. A shard may take minutes on a slow line.
    return {"timeout": os.environ.get("AWS_TIMEOUT") or "5min", "allow_http": _plain_http()}


def _plain_http() -> bool:
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")


def _retries() -> dict[str, Any]:
    backoff = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=5), "base": 2}
    return {"max_retries": 8, "backoff": backoff, "retry_timeout": timedelta(seconds=60)}


def probe(place: Place) -> None:
    """Try what commits rely on: a key is created once, also by racing threads; `StoreError` where it is not.

    It writes two objects under ``probe/`` and removes them.
    """
    keys, tag = [f"probe/{secrets.token_hex(8)}" for _ in range(2)], secrets.token_bytes(8)
    lacking, start = "", threading.Barrier(_RACERS)

    def race(racer: int) -> bool:
        start.wait()
        return place.put_new(keys[1], tag + bytes([racer]))

    try:
        if not place.put_new(keys[0], tag) or place.put_new(keys[0], tag[::-1] + b"-"):
            lacking = "an object was created although its key was taken"
        elif place.get(keys[0]) != tag:
            lacking = "an object was returned with other bytes than those that were written"
        else:
            with ThreadPoolExecutor(_RACERS) as pool:
                won = list(pool.map(race, range(_RACERS)))
            if won.count(True) != 1:
                lacking = f"{won.count(True)} of {_RACERS} racing writers created one key"
            elif place.get(keys[1]) != tag + bytes([won.index(True)]):
                lacking = "the writer that created a key did not write its bytes"
    finally:
        for key in keys:
            place.delete(key)
    if lacking:
        raise StoreError(
            "the object store lacks conditional writes, on which commits rely", code="place-unfit", found=lacking,
            expected="If-None-Match: * (AWS S3, R2, MinIO, GCS, Azure and others have it)", where=place.url,
            fix="another store, or a folder on a shared disk: --home FOLDER",
        )  # fmt: skip
