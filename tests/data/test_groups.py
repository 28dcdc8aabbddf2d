import hashlib
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embcache.data.groups as loading
from embcache.data.dataset import load_dataset
from embcache.data.groups import identical_files, merge_groups, overlap_notes
from embcache.probe.protocol import merged_groups
from tests.data.pictures import write_image

ROWS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", "k", "l", "m", "n"])), max_size=20)


def connected(rows: list[tuple[str, str]]) -> list[frozenset[str]]:
    """The groups each row's group is connected to, by brute force."""
    reach = {g: {g} for g, _ in rows}
    for _ in range(len(reach) + 1):
        for g, k in rows:
            for h, other in rows:
                if g == h or (k and k == other):
                    reach[g] |= reach[h]
    return [frozenset(reach[g]) for g, _ in rows]


@settings(max_examples=30)
@given(ROWS)
def test_groups_are_merged_exactly_when_a_chain_of_keys_connects_them(rows: list[tuple[str, str]]) -> None:
    merged = merge_groups([g for g, _ in rows], [k for _, k in rows])
    assert merged == [min(component) for component in connected(rows)]


@settings(max_examples=30)
@given(ROWS, st.randoms())
def test_the_names_do_not_depend_on_the_order_of_rows(rows: list[tuple[str, str]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    before = dict(zip((g for g, _ in rows), merge_groups(*zip(*rows, strict=True)) if rows else [], strict=True))
    after = dict(zip((g for g, _ in shuffled), merge_groups(*zip(*shuffled, strict=True)) if rows else [], strict=True))
    assert before == after


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=3), max_size=8))
def test_identical_files_are_exactly_those_with_a_twin(tmp_path_factory: object, contents: list[bytes]) -> None:
    root: Path = tmp_path_factory.mktemp("twins")
    for i, content in enumerate(contents):
        (root / str(i)).write_bytes(content)
    found = identical_files(root, {str(i): len(c) for i, c in enumerate(contents)})
    assert found == {
        str(i): hashlib.sha256(c).hexdigest() for i, c in enumerate(contents) if c and contents.count(c) > 1
    }


def test_large_files_that_differ_in_one_byte_are_not_identical(tmp_path: Path) -> None:
    content = bytearray(100_000)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "c").write_bytes(content)
    content[20_000] = 1  # between the parts that are compared first
    (tmp_path / "b").write_bytes(content)
    assert set(identical_files(tmp_path, dict.fromkeys("abc", 100_000))) == {"a", "c"}


def test_notes_count_groups_on_both_sides_of_the_test_set() -> None:
    table = pd.DataFrame({"group": ["p", "p", "q", "q", "r"], "split": ["train", "test", "train", "train", "test"]})
    (note,) = overlap_notes(table)
    assert note.startswith("1 groups occur in both")
    assert "(1 training images)" in note
    assert overlap_notes(table[table["group"] != "p"]) == []


def test_in_a_dataset_of_many_images_the_digests_of_features_group_identical_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        write_image(tmp_path / "ab"[number % 2] / f"{number:02}.png", seed=number)
    (tmp_path / "b" / "twin.png").write_bytes((tmp_path / "a" / "00.png").read_bytes())
    known = load_dataset("folder", tmp_path)
    monkeypatch.setattr(loading, "LOOKED_AT_LOADING", len(known) - 1)
    monkeypatch.setattr(loading, "identical_files", lambda root, sizes: pytest.fail("a file was read"))
    deferred = load_dataset("folder", tmp_path)
    assert deferred.notes[-1].startswith("byte-identical images are not looked for")
    assert deferred.groups.tolist() == deferred.ids.tolist()
    digests = {id_: hashlib.sha256((tmp_path / id_).read_bytes()).hexdigest() for id_ in deferred.ids}
    grouped = merged_groups(deferred, digests).tolist()
    assert grouped == known.groups.tolist() == merged_groups(known, digests).tolist()
    assert grouped[deferred.ids.tolist().index("b/twin.png")] == "a/00.png"
