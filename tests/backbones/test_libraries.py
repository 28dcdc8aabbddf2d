"""What loaders of models with an optional library share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from embcache.backbones.catalog import find_backbone
from embcache.backbones.hub import canonical_name, is_repository
from embcache.errors import UsageError
from tests.refusal import refused


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("hf:someone/net", "transformers", "hf"),
        ("open_clip:ViT-B-32/openai", "open_clip", "clip"),
        ("onnx:net.onnx", "onnx", "onnx"),
    ],
)
def test_a_library_that_is_not_installed_is_one_error_that_names_the_extra(
    name: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "someone" / "net" / "config.json", tmp_path / "net.onnx"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with refused(UsageError, "library-missing") as caught:
        find_backbone(name)
    assert caught.value.fix == f"pip install 'embcache[{extra}]'"


def test_names_of_stores_have_no_path_and_no_revision(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "open_clip_config.json").write_text("{}")
    assert canonical_name(f"open_clip:{tmp_path / 'net'}") == "open_clip:net"
    assert canonical_name("open_clip:hf-hub:org/net@main") == "open_clip:hf-hub:org/net"
    assert [is_repository(text) for text in ("org/net@main", "./net", "a/b/c", "~/net", "net")] == [True, *[False] * 4]
