import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from embcache.data.budget import quiet


def warn(module: str, category: type[Warning] = UserWarning) -> None:
    warnings.warn_explicit("stray", category, "file.py", 1, module=module)


def test_warnings_of_the_module_are_ignored_and_others_are_not() -> None:
    with quiet("noisy"):
        warn("noisy")
        with pytest.raises(UserWarning):
            warn("other")
    with pytest.raises(UserWarning):
        warn("noisy")


def test_an_exception_inside_puts_the_filters_back() -> None:
    before = list(warnings.filters)
    with pytest.raises(ValueError, match="broken"), quiet("noisy"):
        raise ValueError("broken")
    assert warnings.filters == before


def test_threads_are_inside_together_and_the_last_puts_the_filters_back() -> None:
    before = list(warnings.filters)
    together = threading.Barrier(4, timeout=30)

    def decode(number: int) -> None:
        with quiet(f"noisy{number % 2}"):
            together.wait()  # breaks where only one thread is let in
            warn(f"noisy{number % 2}")
            together.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode, range(4)))
    assert warnings.filters == before


def test_one_that_leaves_early_takes_nothing_from_the_others() -> None:
    inside, left = threading.Event(), threading.Event()

    def stay() -> None:
        with quiet("noisy"):
            inside.set()
            assert left.wait(30)
            warn("noisy")

    with ThreadPoolExecutor(1) as pool:
        before = list(warnings.filters)
        with quiet("other"):
            staying = pool.submit(stay)
            assert inside.wait(30)
        left.set()
        staying.result()
        assert warnings.filters == before
