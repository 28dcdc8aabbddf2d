"""What a person or the reader of a bug report needs to know of an installation (``embcache doctor``)."""

from __future__ import annotations

import io
import os
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from PIL import Image

import embcache
from embcache.backbones.catalog import BACKBONES, weights_status
from embcache.backbones.hub import why_refused, why_unreachable
from embcache.cores import cpu_flags, proc_info, usable_cores
from embcache.data.images import DECODER_VERSION, decode_image
from embcache.data.published import DATASETS, default_root
from embcache.errors import EmbcacheError
from embcache.log import log
from embcache.maintain.listing import CachedStore, list_cached, list_interrupted, walk_stores
from embcache.maintain.verify import lease_files, leftovers
from embcache.mirror import shown_home
from embcache.paths import PathLike, data_dir, home_dir, weights_dir
from embcache.places import is_url
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import is_abandoned

PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "zarr", "h5py", "google-crc32c",
    "scikit-learn", "scipy", "safetensors", "Pillow", "pydicom", "python-gdcm", "pylibjpeg-openjpeg", "pyjpegls",
    "huggingface_hub", "typer", "openvino", "onnxruntime", "obstore", "ray",
)  # fmt: skip
# Of the processor's own list, those that decide which kernels torch has.
FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "neon", "asimd", "sve",
    "bf16",
)  # fmt: skip
_SECONDS = 0.3  # of each measurement
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the multiplied matrices
_COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes
_SPARE = 1.1  # disk space that is needed, with what a run writes in addition to features


@dataclass(frozen=True)
class Diagnosis:
    """All of it, as plain data."""

    versions: dict[str, str]
    machine: dict[str, Any]
    devices: list[dict[str, Any]]  # with the speed that each reaches
    decoding: dict[str, Any]
    places: list[dict[str, Any]]  # home, data and weights folders
    owed: dict[str, Any]  # images that the stores still owe, the bytes they will take, and those free
    weights: list[dict[str, str]]
    gated: list[dict[str, str]]  # weights with terms to accept, and why they cannot be fetched, if so
    datasets: list[dict[str, Any]]
    stores: list[dict[str, Any]]
    leases: list[dict[str, Any]]
    interrupted: list[dict[str, Any]]
    problems: list[str]  # what a person should do something about, with the command that does it


def diagnose(home: PathLike | None = None) -> Diagnosis:
    """Look at everything; nothing needs to be cached, and nothing is written."""
    problems: list[str] = []
    log.info("measuring the devices")
    measured, decoded = devices(), decoding()
    problems += [f"{d['device']} cannot be used: {d['problem']}" for d in measured if d["problem"]]
    places = [_place("home", home_dir(home)), _place("data", data_dir()), _place("weights", weights_dir(home))]
    if not places[0]["writable"]:
        problems.append(f"{places[0]['path']} cannot be written: give --home FOLDER, or set EMBCACHE_HOME")
    log.info("checking every store")
    cached = list_cached(home)
    owed = _owed(cached, places[0], problems)
    stores, leases = _stores(home, cached, problems)
    return Diagnosis(
        versions=versions(),
        machine=machine(),
        devices=measured,
        decoding=decoded,
        places=places,
        owed=owed,
        weights=[{"backbone": name, "status": weights_status(name, home)} for name in BACKBONES],
        gated=gated_weights(),
        datasets=[
            {"dataset": name, "path": str(root), "there": root.exists()}
            for name in DATASETS
            if name != "folder" and (root := default_root(name, home))
        ],
        stores=stores,
        leases=leases,
        interrupted=[
            {"dataset": run.dataset, "run": run.id, "bytes": run.bytes, "path": str(run.path), "command": run.command}
            for run in list_interrupted(home)
        ],
        problems=problems,
    )


def _place(name: str, path: Path) -> dict[str, Any]:
    nearest = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    usage, writable = shutil.disk_usage(nearest), nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    answer = {"name": name, "path": shown_home(path), "there": path.exists(), "writable": writable}
    return answer | {"free_bytes": usage.free, "disk_bytes": usage.total}


def _owed(cached: list[CachedStore], home: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Images still to compute under the recipes that are cached, and the room that their features take."""
    rows = [(row.owed, FeatureStore(row.path)) for row in cached if row.owed and not row.problem]
    images = sum(owed for owed, _ in rows)
    size = sum(owed * prod(store.row_shape) * store.dtype.itemsize for owed, store in rows)
    enough = is_url(home["path"]) or size * _SPARE <= home["free_bytes"]
    if not enough:
        problems.append(
            f"what is planned takes {size / 1e9:.1f} GB and {home['free_bytes'] / 1e9:.1f} GB are free in "
            f"{home['path']}: free space, or give --home FOLDER"
        )
    return {"images": images, "bytes": size, "free_bytes": home["free_bytes"], "enough": enough}


def _stores(
    home: PathLike | None, cached: list[CachedStore], problems: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A quick check of each store (headers, plans, indexes, sizes), and the leases in all of them."""
    known = {row.path: row for row in cached}
    stores, leases = [], []
    paths, unread = walk_stores(home)
    for each in unread:
        problems.append(f"{each['path']} cannot be read: {each['error']}: ask its owner for permission (chmod -R g+rX)")
    for path in paths:
        row, name = known.get(path), f"{path.parent.name}/{path.name}"
        problem, left, claims = row.problem if row else "recipe.json is missing", 0, list[Path]()
        try:
            claims = lease_files(path)
            left = len(set(leftovers(path)) - set(claims))
            if row and not problem:
                FeatureStore(path).sources()  # reads the plans too
        except EmbcacheError as error:
            problem = f"{error.problem} ({error.where})"
        except OSError as error:
            problem = problem or f"{error.strerror} ({error.filename})"
        if problem:
            problems.append(f"{name}: {problem}: embcache verify names it and what to type")
        counts = {key: vars(row)[key] if row else 0 for key in ("rows", "owed", "quarantined", "bytes")}
        answer = {"dataset": path.parent.name, "store": path.name, **counts, "leftovers": left, "problem": problem}
        stores.append(answer)
        leases += [{"store": name, "shard": int(claim.stem), "stale": is_abandoned(claim)} for claim in claims]
    return stores, leases


def versions() -> dict[str, str]:
    """Version of Python and of each package that matters; ``not installed`` for optional ones."""
    found = {"embcache": embcache.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        found[name] = "not installed"
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def gated_weights() -> list[dict[str, str]]:
    """Of each backbone with terms to accept, the reason why its files cannot be fetched; empty where they can."""
    rows = [row for row in BACKBONES.values() if row.gated]
    offline = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else why_unreachable(seconds=3)
    if offline:
        return [{"backbone": row.name, "problem": f"not checked, no hub: {offline}"} for row in rows]
    with ThreadPoolExecutor(8) as pool:
        reasons = pool.map(why_refused, [row.repository for row in rows])
        return [{"backbone": row.name, "problem": reason} for row, reason in zip(rows, reasons, strict=True)]


def machine() -> dict[str, Any]:
    """Operating system, processor with what it can, cores, threads and memory."""
    info, memory = proc_info("cpuinfo"), proc_info("meminfo")
    total, free = (memory.get(name, "").removesuffix("kB").strip() for name in ("MemTotal", "MemAvailable"))
    flags = cpu_flags()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in flags],
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "cores_of_machine": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": int(total) * 1024 if total else None,
        "memory_free_bytes": int(free) * 1024 if free else None,
        "decoder": DECODER_VERSION,
    }


def devices() -> list[dict[str, Any]]:
    """Each device with the speed that it reaches: multiplying matrices, and copying memory."""
    found = [_device("cpu", "processor", None)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(_device(f"cuda:{index}", properties.name, properties.total_memory))
    return found


def decoding() -> dict[str, Any]:
    """Images per second that are decoded from JPEGs of 512×512, by one thread and by one per core."""
    coarse = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    data, cores = buffer.getvalue(), usable_cores()
    one = _per_second(lambda: decode_image(data))
    with ThreadPoolExecutor(cores) as pool:
        many = _per_second(lambda: list(pool.map(decode_image, [data] * cores * 4))) * cores * 4
    return {"image": "512x512 JPEG", "one_thread": one, "threads": cores, "all_threads": many}


def _device(name: str, title: str, memory: int | None) -> dict[str, Any]:
    device = torch.device(name)
    answer: dict[str, Any] = {"device": name, "name": title, "memory_bytes": memory, "problem": ""}
    try:
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            side = _SIDE[device.type]
            one = torch.ones((side, side), dtype=dtype, device=device)
            answer[f"{kind}_tflops"] = 2 * side**3 * _per_second(lambda one=one: one @ one) / 1e12  # type: ignore[misc]
        source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        answer["memory_gb_s"] = 2 * len(source) * _per_second(lambda: target.copy_(source)) / 1e9  # read and written
        if device.type == "cuda":
            answer["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    except RuntimeError as error:  # a device that is there and cannot be used, or has no memory left
        answer["problem"] = str(error).splitlines()[0]
    return answer


def _per_second(work: Callable[[], object]) -> float:
    """How often ``work`` is done per second, once it is warm; GPUs are waited for."""
    work()
    cuda: Any = torch.cuda
    wait = cuda.synchronize if cuda.is_initialized() else lambda: None
    wait()
    count, start = 0, perf_counter()
    while (seconds := perf_counter() - start) < _SECONDS or not count:
        work()
        wait()
        count += 1
    return count / seconds
