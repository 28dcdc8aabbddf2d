"""The optimization of the paper (Sections 5.2 and B.1) and the choices where it is silent, as plain Python numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from embcache.errors import ProtocolError, UsageError, check_number

if TYPE_CHECKING:
    from embcache.runs.result import Result

GENTLE = {"lr": 1e-4, "batch_size": 16}  # for DINO's ViT-S/8 (Section B.2), also where it is fused (choice)
# timm's names of DINO-trained ViT-S/8: ``vit_small_patch8_224.dino``, ``vit_small_patch8_224.lunit_dino`` …
_VIT_S8_DINO = re.compile(r"vit_small_patch8_224[._](.+_)?dino(_.+)?")
_DINO = ("dino", "timm:vit_small_patch8_224")  # the paper's, and timm's without a tag, whose default weights are DINO's


@dataclass(frozen=True)
class Schedule:
    """How a head is trained. The defaults are the protocol's."""

    lr: float = 1e-3  # first learning rate of Adam (torch's betas and eps, no weight decay)
    batch_size: int = 64  # the last, partial batch is kept
    max_epochs: int = 50  # training ends after so many epochs at the latest
    min_epochs: int = 30  # and never before so many
    patience: int = 10  # epochs without a better validation score, counted from the first, obeyed from ``min_epochs``
    plateau_patience: int = 5  # the rate falls after more than so many epochs without a better validation score
    plateau_factor: float = 0.1  # by which it is multiplied then

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(
                "the learning rate must be a positive number", code="option-bounds", found=str(self.lr), where="--lr",
                fix="--lr 1e-3",
            )  # fmt: skip
        check_number("--batch-size", self.batch_size, 1, 1 << 20)
        for name in ("max_epochs", "min_epochs", "patience"):
            check_number(f"--{name.replace('_', '-')}", getattr(self, name), 1, 100_000)

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as a run's request holds them."""
        return dict(asdict(self).items() - asdict(Schedule()).items())


class Tracker:
    """Follows the validation score of one head: learning rate, best epoch, when to stop.

    The plateau rule is ``torch.optim.lr_scheduler.ReduceLROnPlateau(mode="max", factor=0.1, patience=5, threshold=0)``;
    only a strictly better score counts, so that ties keep the earliest epoch.
    """

    def __init__(self, schedule: Schedule, lr: float | None = None) -> None:
        self.schedule = schedule
        self.lr = schedule.lr if lr is None else lr
        self.epoch = 0  # epochs seen; epochs are counted from 1
        self.best_epoch = 0  # 0: none yet
        self.best_score = -math.inf
        self._bad = 0

    def update(self, score: float) -> bool:
        """Take in the score of one more epoch; True where it is the best so far."""
        self.epoch += 1
        better = score > self.best_score
        if better:
            self.best_score, self.best_epoch, self._bad = score, self.epoch, 0
        else:
            self._bad += 1
        if self._bad > self.schedule.plateau_patience:
            self._bad = 0
            reduced = self.lr * self.schedule.plateau_factor
            if self.lr - reduced > 1e-8:  # ReduceLROnPlateau's eps
                self.lr = reduced
        return better

    @property
    def done(self) -> bool:
        """Whether training ends after the epoch last seen."""
        stale = self.epoch - self.best_epoch >= self.schedule.patience
        return self.epoch >= self.schedule.max_epochs or (stale and self.epoch >= self.schedule.min_epochs)


def rates_of(request: Mapping[str, Any]) -> list[float]:
    """Learning rates that a run's request names; empty for the default one."""
    rates = request.get("lr") or (request.get("schedule") or {}).get("lr") or []
    return list(rates) if isinstance(rates, list | tuple) else [float(rates)]


def schedule_of(result: Result) -> dict[str, Any]:
    """The optimization of a saved run by the names of `Schedule`; empty for a closed-form head."""
    if result.kind == "finetune":
        return asdict(Schedule()) | (result.request.get("schedule") or {})
    if all(fold.lr is None for fold in result.folds):
        return {}
    rates = rates_of(result.request)
    return asdict(Schedule(lr=rates[0]) if rates else Schedule())


def gentle(backbones: Sequence[str]) -> bool:
    """Whether backbones are finetuned with `GENTLE` by default, decided by their names alone."""
    # Architecture and tag of a timm: backbone, without the organization that published it.
    tagged = [name.rpartition("/")[2].removeprefix("timm:") for name in backbones if name.startswith("timm:")]
    return any(name in _DINO for name in backbones) or any(map(_VIT_S8_DINO.fullmatch, tagged))


def diverged_error(what: str, lr: float | None) -> ProtocolError:
    """The error for a head without a model: no finite loss in its first epoch, or (no rate) features not finite."""
    look = "look for features that are not finite: embcache info"
    if lr is None:
        return ProtocolError(
            f"{what} cannot be solved", code="features-not-finite", expected="finite features",
            found="features or outputs that are not numbers", fix=look,
        )  # fmt: skip
    return ProtocolError(
        f"training of {what} diverged in its first epoch", code="training-diverged", expected="finite losses",
        found=f"a loss or an output that is not a number, at learning rate {lr:g}",
        fix=f"--lr {lr / 10:g}, or {look}",
    )  # fmt: skip
