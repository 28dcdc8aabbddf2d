"""Out of memory: the batch is halved, and the shard computed again as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from embcache.errors import EmbcacheError
from embcache.memory import is_shortage

_R = TypeVar("_R")


class Halving:
    """The batch size of a run: smaller from the moment at which the memory did not hold it.

    Parameters
    ----------
    say : callable
        Told of every halving.
    """

    def __init__(self, say: Callable[[str], object] = lambda line: None) -> None:
        self._say = say
        self._most: int | None = None

    def run(self, compute: Callable[[int], _R], batch_size: int) -> tuple[_R, int]:
        """What ``compute`` makes of a shard at ``batch_size`` or less, and the batch size that it was.

        Never two sizes in one shard, so that a shard's rows follow from the one that is recorded.

        Raises
        ------
        EmbcacheError
            One image at a time is too much.
        """
        size = min(batch_size, self._most or batch_size)
        while True:
            try:
                return compute(size), size
            except (RuntimeError, MemoryError) as error:
                if not is_shortage(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if size == 1:
                    raise EmbcacheError(
                        "the memory does not hold the network and one image",
                        found=reason,
                        fix=(
                            "--device cpu or another device",
                            "end what else uses the memory; the same command goes on from what is committed",
                        ),
                    ) from error
            # Outside the clause: the error keeps the tensors of its frames alive.
            size = self._most = size // 2
            self._say(f"out of memory ({reason}): the batch is {size} from here on, recorded with each shard")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
