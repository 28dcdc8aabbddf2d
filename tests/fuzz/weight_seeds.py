"""Checkpoint files of every container that is read."""

from __future__ import annotations

import functools
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator

import safetensors.torch
import torch
from torch import nn

from tests.extract.published import dino_full, vissl
from tests.fuzz.mutate import Field, Seed


def module() -> nn.Module:
    """What the checkpoints fill."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@functools.cache
def weight_seeds() -> list[Seed]:
    """safetensors, PyTorch zip and PyTorch legacy, flat and nested."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = module().state_dict()
        contents = {"flat": OrderedDict(state), "vissl": vissl(state), "dino": dino_full(state)}
        shared = {"0.weight": (base := torch.randn(20))[:12].view(4, 3).t().contiguous().t(), "1.bias": base[3:7]}
        contents["shared"] = {**state, **shared}
    made = []
    for name, content in contents.items():
        for legacy in (False, True):
            sink = io.BytesIO()
            torch.save(content, sink, _use_new_zipfile_serialization=not legacy)
            data = sink.getvalue()
            if legacy:
                made.append(Seed(f"{name}.legacy.pth", data, tuple(_pickle_fields(data))))
            else:
                made.append(Seed(f"{name}.pth", data, tuple(_zip_fields(data)), mend_zip))
    plain = safetensors.torch.save({key: value.contiguous() for key, value in state.items()}, {"format": "pt"})
    size = int.from_bytes(plain[:8], "little")
    fields = (Field(0, 8), *(Field(at, 1) for at in range(8, 8 + size)))
    made.append(Seed("plain.safetensors", plain, fields))
    made.append(Seed("nested.safetensors", lying_safetensors({"a": "[" * 3000}), (Field(0, 8),)))
    return made


def lying_safetensors(header: object, data: bytes = b"") -> bytes:
    """A file with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _pickle_fields(data: bytes) -> Iterator[Field]:
    yield from (Field(at, 1) for at in range(len(data)))


def _zip_fields(data: bytes) -> Iterator[Field]:
    start = data.find(b"\x80\x02")
    end = data.find(b"PK", start)
    yield from (Field(at, 1) for at in range(start, end))  # the pickle
    for mark, sizes in (
        (b"PK\x03\x04", {8: 2, 18: 4, 22: 4, 26: 2, 28: 2}),
        (b"PK\x01\x02", {10: 2, 20: 4, 24: 4, 28: 2, 42: 4}),
        (b"PK\x05\x06", {8: 2, 10: 2, 12: 4, 16: 4}),
        (b"PK\x06\x06", {32: 8, 40: 8, 48: 8}),
    ):
        at = data.find(mark)
        while at >= 0:
            yield from (Field(at + offset, size) for offset, size in sizes.items())
            at = data.find(mark, at + 1)


def mend_zip(data: bytes) -> bytes:
    """The archive written anew from what zipfile finds in it, checksums true; as it is where it finds nothing."""
    sink = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(sink, "w") as new:
            for record in old.infolist():
                start = data.find(record.filename.encode(), record.header_offset) + len(record.filename)
                extra = int.from_bytes(data[record.header_offset + 28 : record.header_offset + 30], "little")
                new.writestr(record.filename, data[start + extra : start + extra + record.file_size])
    except Exception:
        return data
    return sink.getvalue()


class Canary:
    """Makes a folder when a pickle of it is loaded without care."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.mkdir, (self.folder,)


def malicious(folder: str) -> bytes:
    """A pickle that makes a folder."""
    return pickle.dumps({"state_dict": Canary(folder)}, protocol=2)
