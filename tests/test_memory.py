"""How libraries say that memory ran out: their own words, as they were seen."""

import pytest

from embcache.memory import is_shortage


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("could not create a primitive"), False),
    ],
)
def test_shortages_are_known_by_their_words(error: Exception, short: bool) -> None:
    assert is_shortage(error) is short
