"""The Hugging Face hub: its failures to give a file, as one message each."""

from __future__ import annotations

import contextlib
import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

from embcache.errors import UsageError, WeightsError


def page_of(repository: str) -> str:
    """Address of a repository, ``ORG/NAME[@REVISION]``."""
    return f"https://huggingface.co/{repository.partition('@')[0]}"


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
