"""Exported heads: the script in the documentation, run as a reader would, gives the run's stored predictions."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from embcache.errors import StoreNotFoundError, UsageError
from embcache.probe.heads import make_head
from embcache.probe.probe import probe_features
from embcache.results.export_head import export_head
from embcache.runs.folders import find_run_anywhere, load_heads, load_predictions, save_run
from embcache.runs.result import run_id
from tests.commands.shell import embcache
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results.md"


def script(folder: Path) -> Path:
    """The documentation's script as a file."""
    (code,) = re.findall(r"```python\n(# head.py.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    path = folder / "head.py"
    path.write_text(code, encoding="utf-8")
    return path


def probe(home: Path, head: str, *, n_classes: int = 3) -> tuple[str, dict[str, np.ndarray], list[str]]:
    ds = make_dataset(np.tile(np.arange(n_classes), 40), split=["train"] * 80 + ["test"] * (40 * n_classes - 80))
    names = ["toy", "other"] if make_head(head).fuses else ["toy"]
    features = {name: make_features(ds, 8 + k, shift=1.0, seed=k) for k, name in enumerate(names)}
    for name, x in features.items():
        put_store(home, ds, name, x)
    options = {"proj_dim": 16} if "dvme" in head else {"hidden": 16} if head == "mlp" else None
    run = probe_features(ds, names, head=head, folds=2, subset=24, home=home, head_options=options).id
    return run, features, ds.table["id"].tolist()


@pytest.mark.parametrize("head", ["mlp", "concat", "dvme", "dvme-identity"])
def test_the_script_in_the_docs_gives_the_stored_predictions(
    home: Path, tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, features, ids = probe(home, head)
    export_head(run, tmp_path / "my-head", fold=1, home=home)
    for name, x in features.items():
        np.savez(tmp_path / f"{name}.npz", features=x)
    files = [f"{name}={tmp_path / name}.npz" for name in features]
    monkeypatch.setattr(sys, "argv", ["head.py", str(tmp_path / "my-head"), *files])
    runpy.run_path(str(script(tmp_path)))
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "a,b,c"
    found = {i: [float(v) for v in line.split(",")] for i, line in zip(ids, lines, strict=True)}
    table = load_predictions(find_run_anywhere(run, home)[1])
    table = table[table["fold"] == 1]
    expected = table[["p_0", "p_1", "p_2"]].to_numpy()
    np.testing.assert_allclose([found[i] for i in table["id"]], expected, rtol=0, atol=1e-5)


def test_the_files_say_what_they_are(home: Path, tmp_path: Path) -> None:
    run, _, _ = probe(home, "linear")
    done = export_head(run, tmp_path / "deep" / "my-head", home=home)
    assert sorted(entry.name for entry in done.folder.iterdir()) == ["head.json", "head.safetensors"]
    about = json.loads((done.folder / "head.json").read_text("utf-8"))
    assert about == done.about
    result, path = find_run_anywhere(run, home)
    assert (about["run"], about["class_names"], about["formula"]) == (run, ["a", "b", "c"], "logits = classifier(x)")
    assert about["tensors"]["classifier.weight"] == {"shape": [3, 8], "dtype": "float32"}
    assert about["backbones"] == [
        {"name": "toy", "fingerprint": result.request["recipes"][0][1], "recipe": result.recipes["toy"]}
    ]
    best = max(range(2), key=lambda k: result.folds[k].val_score or 0.0)
    assert about["fold"] == best
    tensors = load_file(done.folder / "head.safetensors")
    assert {n: t.tolist() for n, t in tensors.items()} == {n: t.tolist() for n, t in load_heads(path)[best].items()}


def test_code_that_only_a_run_names_is_registered_by_its_package(home: Path, tmp_path: Path) -> None:
    run, _, _ = probe(home, "linear")
    result, path = find_run_anywhere(run, home)
    request = {**result.request, "head": {"name": "antigravity:Head"}}
    foreign = replace(result, request=request, id=run_id(request))
    save_run(foreign, load_predictions(path), load_heads(path), home)
    with refused(UsageError, "untrusted-name") as caught:
        embcache("export-head", "--run", foreign.id, "--output", tmp_path / "out", "--home", home)
    assert caught.value.fix == "register it by an entry point of its package"


def test_what_has_no_head_is_refused(home: Path, tmp_path: Path) -> None:
    run, _, _ = probe(home, "linear")
    with refused(UsageError, "unknown-fold"):
        export_head(run, tmp_path / "out", fold=2, home=home)
    with pytest.raises(StoreNotFoundError):
        export_head("nonsense", tmp_path / "out", home=home)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError):
        export_head(run, tmp_path / "file", home=home)
    result, path = find_run_anywhere(run, home)
    for kind in ("finetune", "kaggle"):
        request = {**result.request, "kind": kind}
        other = replace(result, kind=kind, request=request, id=run_id(request))
        save_run(other, load_predictions(path), [], home)
        with refused(UsageError, "no-head"):
            export_head(other.id, tmp_path / "out", home=home)
    assert not (tmp_path / "out").exists()
