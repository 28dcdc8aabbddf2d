"""What this machine is, and the speed that it reaches: a second or two a device."""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import embcache
from embcache.cores import usable_cores
from embcache.data.images import DECODER_VERSION, decode_image

PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "zarr", "h5py", "google-crc32c",
    "scikit-learn", "scipy", "safetensors", "Pillow", "pydicom", "python-gdcm", "pylibjpeg-openjpeg", "pyjpegls",
    "huggingface_hub", "typer",
)  # fmt: skip
# Of the processor's own list, those that decide which kernels torch has.
FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "neon", "asimd", "sve",
    "bf16",
)  # fmt: skip
_SECONDS = 0.3  # of each measurement
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the multiplied matrices
_COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes


def versions() -> dict[str, str]:
    """Version of Python and of each package that matters; ``not installed`` for optional ones."""
    found = {"embcache": embcache.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Operating system, processor with what it can, cores, threads and memory."""
    info = _proc("/proc/cpuinfo")
    flags = set(_field(info, "flags").split()) | set(_field(info, "Features").split())
    memory = {line.partition(":")[0]: line.partition(":")[2] for line in _proc("/proc/meminfo").splitlines()}
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _field(info, "model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in flags],
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "cores_of_machine": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": _kilobytes(memory.get("MemTotal", "")),
        "memory_free_bytes": _kilobytes(memory.get("MemAvailable", "")),
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
    """Images a second that are decoded from JPEGs of 512×512, by one thread and by one a core."""
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
            answer[f"{kind}_tflops"] = _multiplying(device, dtype)
        answer["memory_gb_s"] = _copying(device)
        if device.type == "cuda":
            answer["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    except RuntimeError as error:  # a device that is there and cannot be used, or has no memory left
        answer["problem"] = str(error).splitlines()[0]
    return answer


def _multiplying(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE[device.type]
    one = torch.ones((side, side), dtype=dtype, device=device)
    return 2 * side**3 * _per_second(lambda: one @ one, device) / 1e12


def _copying(device: torch.device) -> float:
    source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) * _per_second(lambda: target.copy_(source), device) / 1e9  # read and written


def _per_second(work: Callable[[], object], device: torch.device | None = None) -> float:
    """How often a second ``work`` is done, once it is warm."""
    gpu = device is not None and device.type == "cuda"

    def settle() -> None:
        if gpu:
            torch.cuda.synchronize(device)

    work()
    settle()
    times, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < _SECONDS:
        work()
        settle()
        times += 1
    return times / taken


def _proc(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""  # not Linux


def _field(text: str, name: str) -> str:
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(name)), "")


def _kilobytes(text: str) -> int | None:
    digits = text.strip().removesuffix("kB").strip()
    return int(digits) * 1024 if digits.isdecimal() else None
