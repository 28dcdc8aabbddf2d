"""The memory that decoding threads share, limits that are decided once, and no stray warnings."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from embcache.data import images
from embcache.data.budget import MAX_PIXELS, Budget, Decoding, check_max_pixels, fits_now, quiet
from embcache.errors import ImageError, UsageError
from tests.data.pictures import encode
from tests.refusal import refused


def test_threads_never_hold_more_than_there_is_and_all_get_through() -> None:
    budget, lock, held, most = Budget(100), threading.Lock(), 0, 0

    def decode(need: int) -> None:
        nonlocal held, most
        with budget.hold(need), budget.hold(need // 2):  # the inner one is part of what the thread holds
            with lock:
                held += min(need, 100)
                most = max(most, held)
            with lock:
                held -= min(need, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [30, 60, 90, 100, 250, 1] * 50))
    assert held == 0
    assert most <= 100


def test_what_a_thread_holds_is_free_again_after_an_error() -> None:
    budget = Budget(10)
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"), budget.hold():
            raise ValueError("broken")
    with budget.hold(10):  # waits for ever where something is still held
        pass


def test_an_image_that_would_take_more_than_any_may_is_refused() -> None:
    with pytest.raises(ImageError, match=r"100\.0 GB of memory"), Decoding().hold(10**11):
        pass


@pytest.mark.parametrize("value", [0, -1, "", "1e6", "٣", 1 << 40, "many", "9" * 5000])
def test_other_limits_on_pixels_are_refused(value: int | str) -> None:
    with refused(UsageError, "option-bounds"):
        check_max_pixels(value)


def test_the_environment_sets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Decoding().max_pixels == MAX_PIXELS == 89_478_485  # what Pillow has by default
    monkeypatch.setenv("EMBCACHE_MAX_PIXELS", "1000")
    assert Decoding().max_pixels == 1000
    monkeypatch.setenv("EMBCACHE_MAX_PIXELS", "none")
    with refused(UsageError, "option-bounds"):
        Decoding()


def test_only_a_limit_that_is_gone_makes_an_image_fit() -> None:
    with pytest.raises(ImageError) as caught:
        images.decode_image(encode(Image.new("L", (50, 30)), "PNG"), decoding=Decoding(1499))
    assert not fits_now(caught.value.problem, 1499)
    assert fits_now(caught.value.problem, 1500)
    assert not fits_now("the file is empty", 10**9)


def warn(module: str, category: type[Warning] = UserWarning) -> None:
    warnings.warn_explicit("stray", category, "file.py", 1, module=module)


def test_warnings_of_the_module_are_ignored_and_others_are_not() -> None:
    with quiet("noisy"):
        warn("noisy")
        with pytest.raises(UserWarning):
            warn("other")
    with pytest.raises(UserWarning):
        warn("noisy")


def test_one_that_leaves_early_takes_nothing_from_the_others() -> None:
    inside, left = threading.Event(), threading.Event()

    def stay() -> None:
        with quiet("noisy"):
            inside.set()
            assert left.wait(300)
            warn("noisy")

    with ThreadPoolExecutor(1) as pool:
        before = list(warnings.filters)
        with quiet("other"):
            staying = pool.submit(stay)
            assert inside.wait(300)
        left.set()
        staying.result()
        assert warnings.filters == before
