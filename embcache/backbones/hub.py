"""The Hugging Face hub: names of repositories, one of their files, and failures to give it as one message each."""

from __future__ import annotations

import contextlib
import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from embcache.backbones.weights import is_model
from embcache.errors import UsageError, WeightsError


def page_of(repository: str) -> str:
    """Address of a repository, ``ORG/NAME[@REVISION]``."""
    return f"https://huggingface.co/{repository.partition('@')[0]}"


def is_repository(text: str) -> bool:
    """Whether a text has the form ``ORG/NAME[@REVISION]``."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def canonical_name(name: str) -> str:
    """The name of a store's backbone: without the path of a folder and a revision, which change no feature."""
    prefix, _, text = name.partition(":")
    folder = Path(text).expanduser()
    return f"{prefix}:" + (folder.resolve().name if is_model(folder) else text.partition("@")[0])


def not_fetched(name: str, repository: str, instead: str) -> Callable[[str], WeightsError]:
    """Makes the error for a model that the hub does not give; ``instead`` is what to do with its files."""
    hub_id = repository.partition("@")[0]
    return lambda reason: WeightsError(
        f"{name} cannot be fetched", code="download-failed", found=reason, where=str(hub_constants.HF_HUB_CACHE),
        expected=page_of(repository),
        fix=f"on a machine with a network: hf download {hub_id}\nthen {instead}",
    )  # fmt: skip


def fetch_file(
    name: str, repository: str, candidates: Sequence[str], unavailable: Callable[[str], WeightsError]
) -> Path:
    """The first of some files that ``ORG/NAME[@REVISION]`` has, from the hub's cache or fetched to it.

    ``name`` and ``unavailable`` are those of `reaching_hub`.
    """
    hub_id, _, revision = repository.partition("@")
    unreachable: LocalEntryNotFoundError | None = None
    for candidate in candidates:
        with reaching_hub(name, repository, candidate, unavailable):
            try:
                return Path(huggingface_hub.hf_hub_download(hub_id, candidate, revision=revision or None))
            except LocalEntryNotFoundError as error:
                unreachable = error  # but the next one may be in the hub's cache
            except EntryNotFoundError:
                continue
    if unreachable is not None:
        raise unavailable(str(unreachable).partition("\n")[0])
    raise WeightsError(
        f"{repository} holds no weights that embcache knows", code="weights-not-found", found="no such file",
        expected=" or ".join(candidates), where=page_of(repository), fix=f"embcache extract --weights {name}=FILE …",
    )  # fmt: skip


@contextlib.contextmanager
def reaching_hub(name: str, repository: str, file: str, unavailable: Callable[[str], WeightsError]) -> Iterator[None]:
    """Turn the hub's failures to give a file into one message, and keep its log of retries off the terminal.

    ``name`` is the model as the user typed it; ``unavailable`` makes the error for a hub that cannot be reached.
    """
    reach_hub(repository, file, unavailable)
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    page = page_of(repository)
    try:
        yield
    except GatedRepoError as error:
        raise WeightsError(
            f"{name} is gated: its authors ask you to accept their terms", code="weights-gated", where=page,
            found="a refusal from the hub", fix=f"accept the terms at {page}, then type: hf auth login",
        ) from error  # fmt: skip
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"the hub has no model {repository!r}, or it is private", code="unknown-backbone",
            found="not found", where=page, fix="check the name; for a private model type: hf auth login",
        ) from error  # fmt: skip
    except (OSError, EntryNotFoundError) as error:
        raise unavailable(str(error).partition("\n")[0]) from error
    finally:
        logger.setLevel(before)


def reach_hub(repository: str, file: str, unavailable: Callable[[str], WeightsError]) -> None:
    """Raise at once, not after a minute of retries, if there is no network and the hub's cache lacks the file."""
    hub_id, _, revision = repository.partition("@")
    try:
        cached = huggingface_hub.try_to_load_from_cache(hub_id, file, revision=revision or None)
    except ValueError as error:
        raise UsageError(
            f"{hub_id!r} is not the name of a model on the hub", code="unknown-backbone", expected="ORG/NAME",
            found=hub_id, fix="embcache extract --backbone timm:hf-hub:ORG/NAME …, or hf:ORG/NAME",
        ) from error  # fmt: skip
    if cached is not None or hub_constants.HF_HUB_OFFLINE:  # a path, or the mark of a file known to be absent
        return
    if reason := why_unreachable():
        raise unavailable(reason)


def why_unreachable(seconds: float = 10) -> str:
    """Why the hub does not answer; empty if it does."""
    request = urllib.request.Request(hub_constants.ENDPOINT, method="HEAD", headers={"User-Agent": "embcache"})
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer of any kind means a network
    except OSError as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def why_refused(repository: str, seconds: float = 10) -> str:
    """Why the files of a repository cannot be fetched with the token of this machine; empty if they can."""
    url = huggingface_hub.hf_hub_url(repository, "config.json")
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=seconds)
    except EntryNotFoundError:
        return ""  # the others can be read
    except GatedRepoError:
        return f"refused: accept the terms at {page_of(repository)}, then type: hf auth login"
    except Exception as error:  # of the hub's library and of the one beneath it, which differs between its versions
        return f"not known: {str(error).partition(chr(10))[0] or type(error).__name__}"
    return ""
