"""The memory that decoding threads share, and limits that are decided once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from embcache.data import images
from embcache.data.budget import MAX_PIXELS, Budget, Decoding, check_max_pixels, fits_now
from embcache.data.images import read_image
from embcache.errors import ImageError, UsageError
from tests.data.pictures import encode, write_image


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


def test_a_large_file_is_read_alone_and_a_larger_one_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_image(tmp_path / "a.png")
    budget = Budget(5)
    monkeypatch.setattr(images, "_LARGE_FILE", 10)
    assert (read_image(tmp_path, "a.png", decoding=Decoding(budget=budget))[0] == pixels).all()
    monkeypatch.setattr(images, "_LARGEST_FILE", 20)
    with pytest.raises(ImageError, match="a file of"):
        read_image(tmp_path, "a.png")


@pytest.mark.parametrize("value", [0, -1, "", "1e6", "٣", 1 << 40, "many", "9" * 5000])
def test_other_limits_on_pixels_are_refused(value: int | str) -> None:
    with pytest.raises(UsageError, match="--max-pixels"):
        check_max_pixels(value)


def test_the_environment_sets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Decoding().max_pixels == MAX_PIXELS == 89_478_485  # what Pillow has by default
    monkeypatch.setenv("EMBCACHE_MAX_PIXELS", "1000")
    assert Decoding().max_pixels == 1000
    monkeypatch.setenv("EMBCACHE_MAX_PIXELS", "none")
    with pytest.raises(UsageError, match="EMBCACHE_MAX_PIXELS"):
        Decoding()


def test_only_a_limit_that_is_gone_makes_an_image_fit() -> None:
    with pytest.raises(ImageError) as caught:
        images.decode_image(encode(Image.new("L", (50, 30)), "PNG"), decoding=Decoding(1499))
    assert not fits_now(caught.value.problem, 1499)
    assert fits_now(caught.value.problem, 1500)
    assert not fits_now("the file is empty", 10**9)
