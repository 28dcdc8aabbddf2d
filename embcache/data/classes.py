"""What is predicted of a dataset: its classes, some left out or merged, or columns in their place.

All of them are other questions to the same images, groups and cached features.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embcache.config import DatasetRef
from embcache.data.columns import (
    FEW_NUMBERS,
    MAX_VALUES,
    NO_VALUE,
    Column,
    column_texts,
    column_values,
    columns,
    numbers_of,
)
from embcache.data.groups import may_name_people, overlap_notes
from embcache.data.label_texts import class_order, merge_example, merges_of, names_in, unclear_labels
from embcache.data.label_texts import label_notes as label_notes
from embcache.data.label_texts import label_numbers as label_numbers
from embcache.data.tables import COLUMNS, SPLITS, match_column
from embcache.errors import DatasetError, UsageError, check_choice, first_few
from embcache.targets import declared, targets
from embcache.targets.findings import (
    ABSENT,
    PRESENT,
    UNCERTAIN,
    UNKNOWN,
    present_in_any,
    read_columns,
    read_list,
    separator_of,
)
from embcache.targets.number import read_numbers

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

MOST_FINDINGS = 100


# Classes left out or merged


def refuse_unclear(ds: ImageDataset) -> None:
    """Ask, by a `UsageError`, what is predicted where the labels of a table look like something else than classes."""
    if ds.kind != "classes" or ds.target or ds.layout != "folder":
        return
    doubts = unclear_labels([ds.class_names[y] for y in ds.labels if y >= 0], ds.class_names)
    if doubts:
        raise UsageError(
            "it is not clear what is to be predicted", code="task-unclear", where=ds.origin or ds.root,
            found="; ".join(note for note, _ in doubts), expected="--task, which says what the labels are",
            fix=[*(f"--task {task}" for _, task in doubts if task), "--task classes to take each value as a class"],
        )  # fmt: skip


def with_ref(ds: ImageDataset, ref: DatasetRef) -> ImageDataset:
    """The dataset with the target and the classes of a reference; see `retarget` and `ImageDataset.with_classes`."""
    # A table without a column of labels keeps what it was loaded for.
    target = ds.ref.target if ref.target is None else ref.target
    task = ref.task or (ds.ref.task if target == ds.ref.target else None)
    if target is not None or task is not None:
        ds = retarget(ds, target, task, uncertain=ref.uncertain, unmentioned=ref.unmentioned)
    if ds.kind != "findings" and (ref.uncertain, ref.unmentioned) != ("unknown", "unknown"):
        raise UsageError(
            "--uncertain and --unmentioned are for findings", code="unused-option", found=f"{ds.name}: {ds.task.nouns}",
            fix="--task findings, or leave them out",
        )  # fmt: skip
    merge = [text for text in ref.merge_class if text not in ds.ref.merge_class]  # the others were merged at loading
    if not (ref.drop_class or merge):
        return ds
    dropped = [name for text in ref.drop_class for name in names_in(text, ",", ds.class_names)]
    return ds.with_classes(dropped, merges_of(merge, ds.class_names))


def new_names(ds: ImageDataset, drop: Iterable[str], merge: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """New name of each class that is dropped (empty) or merged, in the order of the classes."""
    if ds.kind == "number":
        raise UsageError(
            f"classes can be dropped or merged, and {ds.name} has a number as its target", code="not-classes",
            found=first_few(ds.class_names), fix="leave --drop-class and --merge-class out",
        )  # fmt: skip
    dropped = list(dict.fromkeys(drop))
    merged = {name: list(dict.fromkeys(members)) for name, members in merge.items()}
    named = [*dropped, *(member for members in merged.values() for member in members)]
    for name in (name for name in named if name not in ds.class_names):
        near = difflib.get_close_matches(name, ds.class_names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UsageError(
            f"{ds.name} has no class {name!r}{hint}", code="unknown-class", expected=", ".join(ds.class_names)
        )
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        raise UsageError(
            f"class {twice[0]!r} is named in two changes", code="class-named-twice",
            expected="each class dropped or merged once",
        )  # fmt: skip
    for name, members in merged.items():
        found = f"{' + '.join(members)} = {name}"
        if len(members) < 2 or not name.strip():
            raise UsageError(
                "a merge needs two classes or more, and a name for them", code="merge-class", found=found,
                fix=merge_example(dict.fromkeys((*members, *ds.class_names))),
            )  # fmt: skip
        if name in ds.class_names and name not in members:
            raise UsageError(
                f"{ds.name} already has a class {name!r}, which is not one of those to merge", code="class-name-taken",
                expected="a new name, or that of one of " + ", ".join(members), found=found,
                fix=f"another name, or merge {name!r} too",
            )  # fmt: skip
    new = {name: "" for name in dropped} | {m: name for name, members in merged.items() for m in members}
    left = {new.get(name, name) for name in ds.class_names} - {""}
    if len(left) < (1 if ds.kind == "findings" else 2):
        raise UsageError(
            f"fewer than two classes of {ds.name} would be left", code="too-few-classes",
            expected=f"{'one finding' if ds.kind == 'findings' else 'two classes'} or more",
            found=", ".join(left) or "none",
            fix="drop or merge fewer of " + ", ".join(ds.class_names),
        )  # fmt: skip
    return {name: new[name] for name in ds.class_names if name in new}


def rename_classes(ds: ImageDataset, names: Mapping[str, str]) -> ImageDataset:
    """The dataset with classes named as `new_names` says; those with an empty name are left out with their images."""
    if not names:
        return ds
    of = [names.get(name, name) for name in ds.class_names]
    class_names = tuple(dict.fromkeys(name for name in of if name))
    if ds.kind == "findings":
        return _rename_findings(ds, of, class_names, names)
    number = {name: c for c, name in enumerate(class_names)} | {"": -2}
    labels = np.array([*(number[name] for name in of), -1], dtype=np.int64)[ds.labels]  # unlabeled is −1, the last
    table = ds.table.assign(label=labels)[labels >= -1]
    notes = [note for note in ds.notes if note not in overlap_notes(ds.table)]
    notes += _rename_notes(ds, of) + (overlap_notes(table) if len(notes) < len(ds.notes) else [])
    metric = "auc" if ds.metric == "macro_auc" and len(class_names) == 2 else ds.metric
    return replace(
        ds, class_names=class_names, metric=metric, table=table, leaderboard_alpha=None, notes=tuple(notes),
        renamed=_renamed(ds, names), whole=ds.whole or ds,
    )  # fmt: skip


def _renamed(ds: ImageDataset, names: Mapping[str, str]) -> dict[str, str]:
    """New names on top of those given before, by the names of the dataset as it was loaded."""
    before = {**ds.renamed, **{name: name for name in ds.class_names if name not in ds.renamed.values()}}
    return {old: names.get(name, name) for old, name in before.items() if old in ds.renamed or name in names}


def _rename_findings(
    ds: ImageDataset, of: Sequence[str], kept: tuple[str, ...], names: Mapping[str, str]
) -> ImageDataset:
    """Findings left out as columns, their images kept; merged ones are present where any of them is."""
    members = {new: [name for name, other in zip(ds.class_names, of, strict=True) if other == new] for new in kept}
    y = dict(zip(ds.class_names, ds.labels.T, strict=True))
    if taken := [new for new in kept if new not in y and new in ds.table.columns]:
        raise UsageError(
            "a column of the table has the name of a merged finding", code="class-name-taken", found=taken[0],
            expected="a new name", where="--merge-class", fix=f"--merge-class {'+'.join(members[taken[0]])}=NEW",
        )  # fmt: skip
    columns = {new: present_in_any(np.stack([y[name] for name in own])) for new, own in members.items()}
    notes = [f"finding {name} is left out" for name in names if not names[name]]
    notes += [f"findings {', '.join(own)} are one finding, {new}" for new, own in members.items() if len(own) > 1]
    table = ds.table.assign(label=np.where(_any_known(columns), 0, -1).astype(np.int64), **columns)
    return replace(
        ds, class_names=kept, columns=kept, table=table, notes=(*ds.notes, *notes), whole=ds.whole or ds,
        renamed=_renamed(ds, names),
    )  # fmt: skip


def _rename_notes(ds: ImageDataset, of: Sequence[str]) -> list[str]:
    notes = []
    for new in dict.fromkeys(of):
        old = [c for c, name in enumerate(of) if name == new]
        if new and len(old) < 2:
            continue
        names = ", ".join(ds.class_names[c] for c in old)
        split = ds.table["split"][np.isin(ds.labels, old)]
        counts = ", ".join(f"{n:,} {name}" for name in SPLITS if (n := int((split == name).sum())))
        images = f"{len(split):,} images" + (f" ({counts})" if counts else "")
        several = f"classes {names} are" if len(old) > 1 else f"class {names} is"
        notes.append(f"{several} one class, {new}: {images}" if new else f"{several} left out: {images}")
        if new and ds.kind == "ordinal" and old[-1] - old[0] >= len(old):
            notes.append(f"grades {names} are not neighbors: as {new} they take the place of {ds.class_names[old[0]]}")
    return notes


def change_notes(ds: ImageDataset) -> list[str]:
    """The notes on what sets a dataset apart from the one that was loaded: its target and its classes."""
    return [] if ds.whole is None else [note for note in ds.notes if note not in ds.whole.notes]


def class_words(names: Mapping[str, str]) -> str:
    """Changes of classes, as `ImageDataset.renamed` has them, in words: ``a + b = c, without d``; empty without any."""
    merged, dropped = _by_new_name(names)
    words = [f"{' + '.join(members)} = {name}" for name, members in merged.items()]
    return ", ".join([*words, *([f"without {', '.join(dropped)}"] if dropped else [])])


def target_words(request: Mapping[str, Any]) -> str:
    """What a run of this request predicts, in words; empty where it is the dataset's labels as they are."""
    kind = request.get("task", {}).get("kind", "")  # ordered classes are classes by another loss
    target = " ".join(filter(None, [request.get("target", ""), f"({kind})" * (kind in ("findings", "number"))]))
    return ", ".join(filter(None, [target, class_words(request.get("classes", {}))]))


def target_flags(ds: ImageDataset) -> list[str]:
    """The words of a command that predicts what a dataset was given as its target."""
    words = ["--target", ds.target] if ds.target else []
    other = ds.whole is not None and (ds.whole.kind, ds.whole.loss) != (ds.kind, ds.loss)
    return [*words, "--task", ds.kind] if words or other else []


def task_flags(request: Mapping[str, Any]) -> list[str]:
    """The words of a command for the target of a run: columns, task and loss."""
    words = ["--target", request["target"]] if request.get("target") else []
    task = request.get("task", {})
    words += ["--task", task.get("kind", "classes")] if words or task else []
    usual = {"bce": "findings", "squared": "number", "cumulative": "ordinal"}
    words += ["--loss", task["loss"]] if task and task["loss"] not in usual else []
    return words + [w for name in ("uncertain", "unmentioned") if name in task for w in (f"--{name}", task[name])]


def class_flags(names: Mapping[str, str]) -> list[str]:
    """The words of a command that changes classes so, as `ImageDataset.renamed` has them."""
    merged, dropped = _by_new_name(names)
    words = [word for name in dropped for word in ("--drop-class", name)]
    return words + [w for name, members in merged.items() for w in ("--merge-class", f"{'+'.join(members)}={name}")]


def _by_new_name(names: Mapping[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    members: dict[str, list[str]] = {}
    for old in sorted(names):
        members.setdefault(names[old], []).append(old)
    return members, members.pop("", [])


def retarget(
    ds: ImageDataset,
    target: str | None,
    task: str | None = "classes",
    *,
    loss: str = "",
    uncertain: str = "unknown",
    unmentioned: str = "unknown",
) -> ImageDataset:
    """The same images with the values of columns as what is predicted.

    Name, groups and splits stay, so that cached features and folds can still be used. Images without a value are
    unlabeled. There is no leaderboard for a column. A dataset that has this target is returned as it is.

    Parameters
    ----------
    ds : ImageDataset
        Its images and table.
    target : str or None
        A column, or several with commas; None, or ``label``, for the dataset's own labels.
    task : {"classes", "ordinal", "findings", "number"}, optional
        What the values are. None is a guess, with its reason in a note: several columns, or one of lists with
        separators, are findings; more than five distinct numbers are a number; all else classes, which are text as it
        is, ages in bands, other numbers in quarters.
    loss : str
        Loss of trained heads; empty for the task's own (of ``ordinal`` cumulative logits).
    uncertain : {"unknown", "zero", "one"}
        What uncertain values of findings (-1) are.
    unmentioned : {"unknown", "zero"}
        What empty values of findings are.
    """
    if task is not None:
        check_choice("--task", task, _READ)
    check_choice("--uncertain", uncertain, ("unknown", "zero", "one"))
    check_choice("--unmentioned", unmentioned, ("unknown", "zero"))
    names = [] if target is None else _columns_of(ds, target)
    if names == ["label"]:
        names = []
    if ds.renamed and names:
        raise UsageError(
            "classes were dropped or merged before the target was chosen", code="target-after-classes",
            expected="the classes of the target", found=class_words(ds.renamed),
            fix=f"embcache.data.classes.retarget(dataset, {target!r}).with_classes(…)",
        )  # fmt: skip
    title = ", ".join(names)
    if (title == ds.target and task in (None, ds.kind)) or (target is None and task is None):
        loss = loss or ("cumulative" if task == "ordinal" else ds.task.loss)
        return ds if loss == ds.task.loss else replace(ds, loss=loss, whole=ds.whole or ds)
    if not names and task == "classes" and ds.kind == "ordinal":
        return replace(
            ds, kind="classes", loss="", notes=(*ds.notes, "grades are taken as classes"), whole=ds.whole or ds
        )
    texts = {name: _texts(ds, name) for name in names} or {"label": _own_texts(ds)}
    why = ""
    if task is None:
        task, why = guess_task(texts)
        doubts = unclear_labels(texts[names[0]], class_order(texts[names[0]])) if task == "classes" and names else []
        if doubts:
            raise UsageError(
                f"it is not clear what column {names[0]!r} holds", code="task-unclear", where=ds.origin or ds.root,
                found="; ".join(note for note, _ in doubts), expected="--task, which says what is predicted",
                fix=[f"--task {task}" for task in dict.fromkeys([*(t for _, t in doubts if t), "classes"])],
            )  # fmt: skip
    kept = names or ["label"]
    reading = _READ[task](ds, texts, (uncertain, unmentioned))
    guessed = f"the target is {_title(kept)} ({task}): {why}; --task takes it otherwise"
    notes = [guessed] if why and task != "classes" else []
    if not names:
        notes.append(f"the labels are taken as {task}, as --task says")
    elif task == "classes":
        notes.append(f"the labels are the column {names[0]!r}, not those of the dataset")
    elif not notes:
        notes.append(f"the target is {_title(kept)} as {task}, not the labels of the dataset")
    columns = reading.columns
    label = np.where(_any_known(columns), 0, -1) if reading.labels is None else reading.labels
    unknown = int((label < 0).sum())
    if unknown:
        value = f"value of {_title(kept)}" if names else "label"
        notes.append(f"{unknown:,} of {len(ds):,} images have no {value} that training has")
    metric = "macro_auc" if task == "classes" and len(reading.names) > 2 else targets.get(task).metric
    table = ds.table.assign(label=np.asarray(label, dtype=np.int64), **columns)
    settled = task != "findings" or any(_settled(ds, name) for name in names)
    ref = ds.ref if settled else replace(ds.ref, uncertain=uncertain, unmentioned=unmentioned)
    return replace(
        ds, ref=ref, class_names=reading.names, metric=metric, table=table, leaderboard_alpha=None, target=title,
        notes=(*ds.notes, *notes, *reading.notes), whole=ds.whole or ds, kind=task, columns=tuple(columns),
        loss=loss or ("cumulative" if task == "ordinal" else ""),
    )  # fmt: skip


def _title(names: Sequence[str]) -> str:
    return f"the column {names[0]!r}" if len(names) == 1 else f"the columns {', '.join(names)}"


def _any_known(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    known = [np.isfinite(y) if y.dtype.kind == "f" else y >= 0 for y in columns.values()]
    return np.asarray(np.any(known, axis=0))


def _columns_of(ds: ImageDataset, target: str) -> list[str]:
    """The columns that a text names with commas; a column may have a comma in its own name."""
    own = [*columns(ds), "label"]
    add = None if len(own) > 1 else "add columns to the table of your images (docs/results.md), or use another dataset"
    names = [target] if target in own else names_in(target, ",", own)
    found = [match_column(name, own, ds.name, fix=add) for name in names if name]
    if not found or len(set(found)) < len(found) or ("label" in found and len(found) > 1):
        raise UsageError(
            "--target names no columns, or one twice", code="target-columns", found=repr(target),
            expected="a column, or several with commas", fix="--target COLUMN,COLUMN",
        )  # fmt: skip
    return found


def _settled(ds: ImageDataset, name: str) -> bool:
    """Whether a column holds a finding of the target, of which -1 is unknown rather than uncertain."""
    return ds.kind == "findings" and name in ds.columns


def _texts(ds: ImageDataset, name: str) -> list[str]:
    return column_texts(ds, name, NO_VALUE - {"none"} | ({"-1"} if _settled(ds, name) else set()))


def _own_texts(ds: ImageDataset) -> list[str]:
    """The labels of a dataset as texts; grades with names of their own as their numbers."""
    if ds.kind not in ("classes", "ordinal"):
        raise UsageError(
            f"{ds.name} has {ds.task.nouns}, which cannot be taken as something else", code="task-of-target",
            found=first_few(ds.class_names), fix="--target COLUMN with --task",
        )  # fmt: skip
    names = [str(c) for c in range(len(ds.class_names))] if ds.kind == "ordinal" else list(ds.class_names)
    return [names[y] if y >= 0 else "" for y in ds.labels.tolist()]


def guess_task(texts: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """What columns seem to hold, and why."""
    if len(texts) > 1:
        return "findings", f"{len(texts)} columns, one finding each"
    ((name, values),) = texts.items()
    known = set(values) - {""}
    if re.search(r"(^|[^a-z])id$", name.lower()) is None and numbers_of(list(values), infinite=True) is not None:
        if len(known) > FEW_NUMBERS or numbers_of(list(values)) is None:  # reading refuses what is infinite
            return "number", f"it holds {len(known):,} distinct numbers"
        return "classes", f"it holds {len(known):,} distinct numbers"
    wrong = [value for value in known if numbers_of([value]) is None]
    if len(known) > MAX_VALUES and len(wrong) <= len(known) // 10:  # reading names them
        return "number", f"all but {len(wrong):,} of its {len(known):,} distinct values are numbers"
    if separator := separator_of(values):
        return "findings", f"its values are lists with {separator!r} between findings"
    return "classes", f"it holds {len(known):,} distinct texts"


@dataclass(frozen=True)
class _Reading:
    names: tuple[str, ...]
    labels: NDArray[np.int64] | None = None  # of classes
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # of findings and numbers
    notes: Sequence[str] = ()


def _read_classes(ds: ImageDataset, texts: Mapping[str, Sequence[str]], doubtful: tuple[str, str]) -> _Reading:
    name, values = _one(texts, "classes")
    found = Column(name, ds.class_names, np.array(values, dtype=object))
    if name != "label":
        distinct = set(values) - {""}
        if len(distinct) > MAX_VALUES and numbers_of(values) is None:
            raise DatasetError(
                f"column {name!r} of {ds.name} has too many values for classes", code="column-values",
                expected=f"at most {MAX_VALUES} distinct values, or numbers", where=ds.origin or ds.root,
                found=f"{len(distinct):,}" + ("" if may_name_people(name) else f" ({first_few(sorted(distinct), 3)})"),
                fix=("another column", "--task number", "--task findings where it lists them"),
            )  # fmt: skip
        found = column_values(ds, name, NO_VALUE - {"none"})  # which may be a grade
    seen = set(found.of[_training(ds)].tolist())
    names = tuple(value for value in found.values if value in seen)
    _check_varies(ds, name, names)
    return _Reading(names, _numbered(found.of, names), notes=found.notes)


def _read_ordinal(ds: ImageDataset, texts: Mapping[str, Sequence[str]], doubtful: tuple[str, str]) -> _Reading:
    name, values = _one(texts, "ordinal")
    own = name == "label" and ds.kind == "ordinal"
    names = ds.class_names if own else class_order(set(np.array(values, dtype=object)[_training(ds)].tolist()))
    if own:
        values = [names[int(text)] if text else "" for text in values]
    elif not all(grade.removeprefix("-").isdecimal() for grade in names) and len(names) > 2:
        raise DatasetError(
            f"the order of the values of {name!r} is not known", code="order-unknown", found=first_few(names, 6),
            expected="grades as whole numbers: 0, 1, 2, …", where=ds.origin or ds.root,
            fix="number the grades in the table, or --task classes",
        )  # fmt: skip
    if len(names) > MAX_VALUES:
        raise DatasetError(
            f"column {name!r} has too many values for grades", code="column-values", found=f"{len(names):,}",
            expected=f"at most {MAX_VALUES}", where=ds.origin or ds.root, fix="--task number",
        )  # fmt: skip
    _check_varies(ds, name, names)
    return _Reading(names, _numbered(np.array(values, dtype=object), names))


def _read_findings(ds: ImageDataset, texts: Mapping[str, Sequence[str]], doubtful: tuple[str, str]) -> _Reading:
    where = ds.origin or ds.root
    texts = {name: [v or "?" for v in values] if _settled(ds, name) else values for name, values in texts.items()}
    if len(texts) == 1:
        ((name, values),) = texts.items()
        separator = separator_of(values)
        decimal = any(re.fullmatch(r"[+-]?\d*,\d+", value) for value in values)
        if separator or (
            not decimal
            and numbers_of(list(values)) is None
            and {value.casefold() for value in values} - (PRESENT | ABSENT | UNCERTAIN | UNKNOWN)
        ):
            values = [text or "No finding" for text in values] if doubtful[1] == "zero" else values
            names, y, notes = read_list(name, values, separator, where=where)
            return _as_columns(ds, names, y, notes)
    y, notes = read_columns(texts, *doubtful, where=where)
    return _as_columns(ds, tuple(texts), y, notes)


def _as_columns(ds: ImageDataset, names: tuple[str, ...], y: NDArray[np.int64], notes: Sequence[str]) -> _Reading:
    if taken := [name for name in names if name in COLUMNS]:
        raise DatasetError(
            f"a finding may not be called {taken[0]!r}", code="class-names", found=first_few(names),
            expected=f"other names than {', '.join(COLUMNS)}", where=ds.origin or ds.root, fix="rename it in the table",
        )  # fmt: skip
    if len(names) > MOST_FINDINGS or not names:
        raise DatasetError(
            f"{len(names):,} findings are listed", code="column-values", found=first_few(names),
            expected=f"1 to {MOST_FINDINGS} findings", where=ds.origin or ds.root,
            fix=("--task classes", "another column"),
        )  # fmt: skip
    return _Reading(names, columns=dict(zip(names, y.T, strict=True)), notes=notes)


def _read_number(ds: ImageDataset, texts: Mapping[str, Sequence[str]], doubtful: tuple[str, str]) -> _Reading:
    name, values = _one(texts, "number")
    y, notes = read_numbers(name, values, where=ds.origin or ds.root)
    known = np.unique(y[_training(ds) & np.isfinite(y)])
    _check_varies(ds, name, [f"{value:g}" for value in known[:2]])
    column = "label as a number" if name == "label" else name
    return _Reading((column,), columns={column: y}, notes=notes)


_READ = {"classes": _read_classes, "ordinal": _read_ordinal, "findings": _read_findings, "number": _read_number}


def _one(texts: Mapping[str, Sequence[str]], task: str) -> tuple[str, Sequence[str]]:
    if len(texts) > 1:
        raise UsageError(
            f"--task {task} predicts one column", code="target-columns", found=", ".join(texts),
            fix=(f"--target {shlex.quote(next(iter(texts)))}", "--task findings"),
        )  # fmt: skip
    return next(iter(texts.items()))


def _training(ds: ImageDataset) -> NDArray[np.bool_]:
    return np.asarray(ds.table["split"].to_numpy(dtype=object) == "train")


def _numbered(values: NDArray[np.object_], names: Sequence[str]) -> NDArray[np.int64]:
    number = {value: c for c, value in enumerate(names)}
    return np.array([number.get(value, -1) for value in values], dtype=np.int64)


def _check_varies(ds: ImageDataset, name: str, values: Sequence[str]) -> None:
    if len(values) < 2:
        raise DatasetError(
            f"column {name!r} of {ds.name} has one value only, so there is nothing to predict",
            code="too-few-classes", expected="two values or more among the images for training",
            found=", ".join(values) or "none",
            fix="another column: " + ", ".join(c for c in columns(ds) if c != name),
        )  # fmt: skip


def task_of(ds: ImageDataset) -> dict[str, str]:
    """The task as the request of a run has it, with how doubtful findings were read where that is not as unknown."""
    doubtful = ("uncertain", "unmentioned") if ds.kind == "findings" else ()
    return declared(ds.task, ds.target) | {name: how for name in doubtful if (how := vars(ds.ref)[name]) != "unknown"}


def ref_of_run(ref: DatasetRef, request: Mapping[str, Any]) -> DatasetRef:
    """How the dataset of a run is read, where the run says how doubtful findings were."""
    request = request.get("of", request)
    task = request.get("task", {})
    doubtful = {name: task[name] for name in ("uncertain", "unmentioned") if name in task}
    return replace(ref, target=request.get("target"), task=task["kind"], **doubtful) if doubtful else ref


def as_in_run(ds: ImageDataset, request: Mapping[str, Any]) -> ImageDataset:
    """The dataset with the target of a run: its columns and task, its classes dropped or merged."""
    request = request.get("of", request)
    task = request.get("task", {})
    if request.get("target") or task:
        kind = task.get("kind", "classes")
        doubtful = {name: task.get(name, "unknown") for name in ("uncertain", "unmentioned")}
        ds = retarget(ds, request.get("target"), kind, loss=task.get("loss", "softmax"), **doubtful)
    return rename_classes(ds, request.get("classes", {}))
