"""Findings: several of L may be present in an image; a finding that is not known is left out, never negative."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embcache.errors import DatasetError, first_few
from embcache.targets.labels import log_mean_exp
from embcache.targets.target import BoolArray, FloatArray, IntArray, Target, refuse_part

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


PRESENT = {"1", "1.0", "yes", "y", "true", "t", "positive", "pos", "present", "+"}
ABSENT = {"0", "0.0", "no", "n", "false", "f", "negative", "neg", "absent", "-"}
UNCERTAIN = {"-1", "-1.0", "uncertain", "u", "equivocal", "indeterminate"}
UNKNOWN = {"", "nan", "none", "null", "na", "n/a", "unknown", "?"}
NOTHING = {"no finding", "no findings", "nofinding", "normal", "none", "negative", "healthy", "no", "0"}
"""Labels that say that there is no finding, in a column that lists findings."""

SEPARATORS = "|;,/+"


@dataclass(frozen=True)
class Findings(Target):
    """Values (n, L): 1 present, 0 absent, −1 unknown. Binary cross-entropy of each known one."""

    kind = "findings"
    noun, nouns = "finding", "findings"
    losses = ("bce", "weighted-bce")
    metric = "macro_auc"
    metrics = ("macro_auc", "micro_auc", "auprc", "micro_auprc", "balanced_accuracy", "f1", "brier")
    group_words = "the maximum of the probabilities of a patient's images; present where it is in any image"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "columns", self.columns or self.names)

    def values(self, table: pd.DataFrame) -> IntArray:
        """Its columns."""
        return table[list(self.columns)].to_numpy(dtype=np.int64)

    def known(self, y: NDArray[Any]) -> BoolArray:
        """Rows with any finding known."""
        return np.asarray((y >= 0).any(1))

    def blank(self, n: int) -> IntArray:
        """−1."""
        return np.full((n, len(self.names)), -1, dtype=np.int64)

    def counts(self, y: NDArray[Any]) -> tuple[int, ...]:
        """Rows with each finding."""
        return tuple((y == 1).sum(0).tolist())

    def words(self, value: Any) -> str:
        """The findings that are present."""
        shown = ", ".join(name for name, v in zip(self.names, value, strict=True) if v == 1)
        return shown or ("" if (value < 0).all() else "none")

    def strata(self, y: NDArray[Any], rows: IntArray, least: int = 1) -> IntArray:
        """Membership (n, L + 1): each finding, and none of them; (n, 2 L + 1), with those known to be without each,
        where some are not known: a finding may be as rarely denied as it is stated.
        """
        present = y == 1
        without = [y == 0] if (y[rows][self.known(y[rows])] < 0).any() else []
        return np.column_stack([present, ~present.any(1), *without]).astype(np.int64) * self.known(y)[:, None]

    def stratum(self, c: int) -> str:
        """The finding, none, or those without it."""
        return [*self.names, "none of them", *(f"without {name}" for name in self.names)][c]

    def check_part(self, y: NDArray[Any], where: str, fix: Sequence[str]) -> None:
        """Each finding needs an image with and one without it."""
        for value, word in ((1, "with"), (0, "known to be without")):
            if lacking := [name for name, n in zip(self.names, (y == value).sum(0), strict=True) if not n]:
                leave = [f"--drop-class {shlex.quote(','.join(lacking))}"]
                leave += ["--unmentioned zero, if an empty value means absent"] if not value and (y < 0).any() else []
                raise refuse_part(
                    where, f"has no image {word} {lacking[0]}", f"{len(y):,} images, none {word} {', '.join(lacking)}",
                    [*leave, *fix], "finding-one-sided",
                )  # fmt: skip

    def absent(self, y: NDArray[Any]) -> list[int]:
        """Findings without a row on either side."""
        return [c for c in range(len(self.names)) if len({0, 1} & set(y[:, c].tolist())) < 2]

    def constants(self, y: NDArray[Any]) -> dict[str, Tensor]:
        """``target.positive`` (L,) with ``weighted-bce``: rows without each finding to rows with it."""
        import torch

        if self.loss == "bce":
            return {}
        present, absent = (torch.from_numpy((y == value).sum(0)).float() for value in (1, 0))
        return {"target.positive": absent.clamp_min(1) / present.clamp_min(1)}

    def row_losses(self, out: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The sum over known findings divided by L, so that each known value counts alike."""
        import torch.nn.functional as F

        # torch's function of this name has a gradient whose last bit depends on how many heads are trained together.
        present, absent = F.logsigmoid(out) * (y == 1), F.logsigmoid(-out) * (y == 0)
        if "target.positive" in params:
            present = present * params["target.positive"][:, None]
        return -(present + absent).sum(-1) / y.shape[-1]

    def predicted(self, logits: NDArray[Any]) -> FloatArray:
        """Probability of each finding."""
        z = np.asarray(logits, dtype=np.float64)
        return np.asarray(np.exp(-np.logaddexp(0.0, -z)))

    def average(self, logits: NDArray[Any], axis: int = 0) -> FloatArray:
        """Log odds of the mean probability."""
        z = np.asarray(logits, dtype=np.float64)
        return log_mean_exp(-np.logaddexp(0.0, -z), axis) - log_mean_exp(-np.logaddexp(0.0, z), axis)

    def of_group(self, logits: NDArray[Any]) -> FloatArray:
        """The maximum."""
        return np.asarray(logits.max(axis=1))

    def group_value(self, y: NDArray[Any]) -> Any:
        """Present where it is in any row, absent where it is in all, else unknown."""
        return present_in_any(y)

    def baseline(self, train: NDArray[Any], test: NDArray[Any]) -> FloatArray:
        """The share of each finding in training."""
        present, absent = ((train == value).sum(0) + 0.5 for value in (1, 0))
        return np.tile(np.log(present / absent), (len(test), 1))


def present_in_any(y: NDArray[Any]) -> IntArray:
    """Values (m, …) joined over the first axis: 1 where any is, 0 where all are, else −1: what may be present."""
    return np.where((y == 1).any(0), 1, np.where((y == 0).all(0), 0, -1))


def read_columns(
    columns: Mapping[str, Sequence[str]],
    uncertain: str = "unknown",
    unmentioned: str = "unknown",
    *,
    where: object = None,
) -> tuple[IntArray, list[str]]:
    """Values (n, L) of columns with one finding each, and notes; ``uncertain`` ones are unknown, zero or one, empty
    (``unmentioned``) ones unknown or zero.
    """
    of = dict.fromkeys(PRESENT, 1) | dict.fromkeys(ABSENT, 0) | dict.fromkeys(UNKNOWN, -1)
    of |= dict.fromkeys(UNCERTAIN, {"unknown": -1, "zero": 0, "one": 1}[uncertain])
    of |= {"": 0} if unmentioned == "zero" else {}
    values, notes, unsure, empty = [], list[str](), 0, 0
    for name, texts in columns.items():
        plain = {text: text.strip().casefold() for text in dict.fromkeys(texts)}  # there may be a million
        if other := [text for text, key in plain.items() if key not in of]:
            raise DatasetError(
                f"column {name!r} holds no finding", code="finding-values", where=where,
                expected="1, 0, yes, no, true, false, positive, negative, -1 or uncertain, or empty for unknown",
                found=first_few(other, 4), fix="--task classes for one such column, or --task number",
            )  # fmt: skip
        unsure += sum(texts.count(text) for text, key in plain.items() if key in UNCERTAIN)
        empty += sum(texts.count(text) for text, key in plain.items() if not key)
        number = {text: of[key] for text, key in plain.items()}
        values.append([number[text] for text in texts])
    if unsure:
        word = {"unknown": "left out as unknown", "zero": "taken as absent", "one": "taken as present"}[uncertain]
        notes.append(f"{unsure:,} uncertain values are {word}; --uncertain unknown, zero or one says how")
    if empty and unmentioned == "zero":
        notes.append(f"{empty:,} empty values are taken as absent; --unmentioned unknown leaves them out")
    y = np.array(values, dtype=np.int64).T.reshape(-1, len(columns))
    if missing := int((y < 0).sum()) - (unsure if uncertain == "unknown" else 0):
        advice = "; --unmentioned zero takes the empty ones as absent" * bool(empty and unmentioned == "unknown")
        left = f"{missing:,} of {y.size:,} values of findings are not known, and left out of loss and scores"
        notes.append(left + advice)
    return y, notes


def separator_of(texts: Sequence[str]) -> str:
    """What divides a column of labels into findings that recur; empty where nothing does."""
    distinct = sorted(set(texts) - {""})
    best, most = "", 0
    for s in SEPARATORS:
        split = [[part.strip() for part in text.split(s)] for text in distinct]
        several = [parts for parts in split if len(parts) > 1]
        alone = {parts[0] for parts in split if len(parts) == 1}
        parts = Counter(part for one in several for part in one)
        if s not in "|;" and all(part.isdecimal() for part in parts):
            continue  # dates, and decimals with a comma
        recur = sum(part in alone or n > 1 for part, n in parts.items())
        if several and all(parts) and recur > len(parts) / 2 and len(several) > most:
            best, most = s, len(several)
    return best


def read_list(
    name: str, texts: Sequence[str], separator: str, *, where: object = None
) -> tuple[tuple[str, ...], IntArray, list[str]]:
    """Names and values (n, L) of one column that lists the findings of each image, and notes."""
    listed = [[part.strip() for part in text.split(separator)] if separator else [text.strip()] for text in texts]
    every = sorted({part for parts in listed for part in parts if part.casefold() not in UNKNOWN | NOTHING})
    number = {part: column for column, part in enumerate(every)}
    spelled: dict[str, list[str]] = {}
    for part in every:
        spelled.setdefault(part.casefold(), []).append(part)
    if alike := [parts for parts in spelled.values() if len(parts) > 1]:
        raise DatasetError(
            "findings differ only in letter case", code="classes-differ-in-case", expected="one spelling per finding",
            found="; ".join(", ".join(parts) for parts in alike), where=where, fix=f"correct the column {name!r}",
        )  # fmt: skip
    y = np.zeros((len(texts), len(every)), dtype=np.int64)
    nothing = set[str]()
    for row, parts in enumerate(listed):
        if all(part.casefold() in UNKNOWN - NOTHING for part in parts):
            y[row] = -1
        for part in parts:
            if part in number:
                y[row, number[part]] = 1
            elif part:
                nothing.add(part)
    words = ", an empty cell unknown" if (y < 0).any() else ""
    words += f", {' and '.join(sorted(nothing))} is none of them" if nothing else ""
    notes = [f"{name} lists the findings of an image: what it does not list is absent{words}"]
    return tuple(every), y, notes
