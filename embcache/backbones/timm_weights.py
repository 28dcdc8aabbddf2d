"""Where the weights of timm's models lie, and fetching them: from the Hugging Face hub, or from a URL.

timm itself never fetches or reads them: its older versions run whatever a pickled checkpoint says. The file is brought
here, and read as every other checkpoint is.
"""

from __future__ import annotations

import contextlib
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from timm.models import load_model_config_from_hf

from embcache.backbones.catalog import Backbone
from embcache.backbones.weights import Published, download
from embcache.errors import UsageError, WeightsError


def fetch_weights(spec: Backbone, folder: Path, allow_download: bool) -> Path:
    """Return the weights that a model's configuration points to: from the hub and its cache, else from a URL."""
    filename = spec.weights.filename
    if not allow_download:
        raise _unavailable(spec.timm, "downloads are not allowed here", filename, folder)
    config = _config(spec.timm)
    if repository := _repository(spec.timm):
        return _fetch_from_hub(spec, repository, config.get("hf_hub_filename"), folder)
    url = config.get("url")
    if isinstance(url, str) and url:
        # As torch.hub has it, a name may end in the first digits of the file's digest.
        stated = re.search(r"-([0-9a-f]{8,})\.\w+$", url)
        return download(Published(url=url, filename=filename, sha256=stated[1] if stated else ""), folder)
    raise WeightsError(
        f"timm knows no weights for {spec.timm}", found="neither a repository on the hub nor a URL",
        expected="a model that timm.list_models(pretrained=True) lists",
        fix=f"embcache extract --weights {spec.name}=FILE …",
    )  # fmt: skip


def _fetch_from_hub(spec: Backbone, repository: str, filename: str | None, folder: Path) -> Path:
    hub_id, _, revision = repository.partition("@")
    candidates = _candidates(filename)
    unreachable: LocalEntryNotFoundError | None = None
    for candidate in candidates:
        reach_hub(spec.timm, repository, candidate, spec.weights.filename, folder)
        with hub_errors(spec.timm, spec.weights.filename, folder):
            try:
                return Path(huggingface_hub.hf_hub_download(hub_id, candidate, revision=revision or None))
            except LocalEntryNotFoundError as error:
                unreachable = error  # but the next may lie in the hub's cache
            except EntryNotFoundError:
                continue
    if unreachable is not None:
        raise _unavailable(spec.timm, str(unreachable).partition("\n")[0], spec.weights.filename, folder)
    raise WeightsError(
        f"{repository} holds no weights that embcache knows", expected=" or ".join(candidates), found="no such file",
        where=f"https://huggingface.co/{hub_id}", fix=f"embcache extract --weights {spec.name}=FILE …",
    )  # fmt: skip


def _candidates(filename: str | None) -> Sequence[str]:
    """Names of the weights in a repository, best first: the safetensors beside what the configuration names, then that.

    As timm looks for them (``_get_safe_alternatives``), whose names are these.
    """
    named = filename or "pytorch_model.bin"
    if not named.endswith(".bin"):
        return (named,)
    known = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    return (known.get(named, named.removesuffix(".bin") + ".safetensors"), named)


def _config(model_name: str) -> Mapping[str, Any]:
    """Where a model's weights lie, among else: from the hub's config.json, or from timm's own table."""
    if model_name.startswith("hf-hub:"):
        repository = model_name.removeprefix("hf-hub:")
        reach_hub(model_name, repository, "config.json")
        try:
            with hub_errors(model_name):
                return dict(load_model_config_from_hf(repository)[0])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"the configuration of {model_name} is not one that timm can use",
                found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300],
                expected="a config.json in timm's layout", fix="choose another model; see `embcache backbones`",
            ) from error  # fmt: skip
    known = timm.get_pretrained_cfg(model_name)
    return {"url": known.url, "hf_hub_filename": known.hf_hub_filename} if known is not None else {}


@contextlib.contextmanager
def hub_errors(model_name: str, filename: str = "", folder: Path | None = None) -> Iterator[None]:
    """Turn the hub's failures into one message of ours, and keep its log of retries off the terminal."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    page = f"https://huggingface.co/{_repository(model_name)}"
    try:
        yield
    except GatedRepoError as error:
        raise WeightsError(
            f"{model_name} is gated: its authors let in those who accept their terms", where=page,
            found="a refusal from the hub", fix=f"accept the terms at {page}, then type: hf auth login",
        ) from error  # fmt: skip
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"the hub has no model {_repository(model_name)!r}, or it is private", found="not found", where=page,
            fix="check the name; for a private model type: hf auth login",
        ) from error  # fmt: skip
    except (OSError, EntryNotFoundError) as error:
        raise _unavailable(model_name, str(error).partition("\n")[0], filename, folder) from error
    finally:
        logger.setLevel(before)


def reach_hub(model_name: str, repository: str, file: str, filename: str = "", folder: Path | None = None) -> None:
    """Raise at once, not after a minute of retries, where there is no network and the hub's cache lacks the file."""
    repository, _, revision = repository.partition("@")
    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
    except ValueError as error:
        raise UsageError(
            f"{repository!r} is not the name of a model on the hub", expected="ORG/NAME", found=repository,
            fix="embcache extract --backbone timm:hf-hub:ORG/NAME …",
        ) from error  # fmt: skip
    if cached is not None or hub_constants.HF_HUB_OFFLINE:  # a path, or the mark of a file known to be absent
        return
    request = urllib.request.Request(hub_constants.ENDPOINT, method="HEAD", headers={"User-Agent": "embcache"})
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer, of whatever kind, is a network
    except OSError as error:
        raise _unavailable(model_name, str(getattr(error, "reason", error)), filename, folder) from error


def _repository(model_name: str) -> str:
    """ORG/NAME on the hub where timm's weights of a model lie; empty where they lie elsewhere."""
    if model_name.startswith("hf-hub:"):
        return model_name.removeprefix("hf-hub:")
    return str(getattr(timm.get_pretrained_cfg(model_name), "hf_hub_id", None) or "")


def _unavailable(model_name: str, reason: str, filename: str = "", folder: Path | None = None) -> WeightsError:
    repository = _repository(model_name)
    page = f"https://huggingface.co/{repository}"
    if model_name.startswith("hf-hub:") or folder is None:
        url, where = page, str(hub_constants.HF_HUB_CACHE)
        fix = f"on a machine with a network: hf download {repository}\nthen copy its folder to {where}"
    else:
        config_url = getattr(timm.get_pretrained_cfg(model_name), "url", "")
        url, where = f"{page}/resolve/main/model.safetensors" if repository else str(config_url), str(folder)
        fix = f"on a machine with a network: curl -L -o {filename} {url}\nthen put it at {folder / filename}"
    return WeightsError(f"{model_name} cannot be fetched", expected=url, found=reason, where=where, fix=fix)
