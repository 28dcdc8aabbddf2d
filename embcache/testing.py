"""Contract suites for authors of plugins: each raises an `AssertionError` that names the promise that does not hold.

::

    from embcache.testing import check_backbone

    def test_my_backbone():
        check_backbone("my_package.networks:small")
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from embcache.backbones.catalog import Backbone, LoadedBackbone, find_backbone, load_backbone
from embcache.backbones.checkpoints import hash_state
from embcache.backbones.transforms import choose_transform
from embcache.data.images import Source
from embcache.extract.worker import FrozenNetwork, compute_shard, freeze
from embcache.paths import PathLike


def check_backbone(
    backbone: str | Backbone | LoadedBackbone, *, weights: PathLike | None = None, size: tuple[int, int] = (96, 96)
) -> None:
    """Check everything that embcache assumes about a backbone, on a CPU.

    Parameters
    ----------
    backbone : str, Backbone or LoadedBackbone
        A name as for ``--backbone``, or a backbone.
    weights : path-like, optional
        Checkpoint to use instead of the published one.
    size : (int, int)
        Height and width of the images, multiples of the patch and at most 224.

    Raises
    ------
    AssertionError
        A promise does not hold.
    EmbcacheError
        There is no such backbone, or it cannot be loaded.
    """
    loaded = backbone if isinstance(backbone, LoadedBackbone) else load_backbone(backbone, weights=weights)
    spec, module = loaded.spec, loaded.module
    _check_row(loaded, backbone)
    transform = choose_transform(spec, "paper", {(size[1], size[0])})
    plain = freeze(loaded, transform, "cpu", "fp32")
    pixels = _draw(4, transform.size)
    before = hash_state(module)
    features = plain.features(pixels)
    assert features.shape == (4, spec.dim), f"features have shape {features.shape}, not {(4, spec.dim)}"
    assert features.dtype == np.float32, f"features are {features.dtype}, not float32"
    assert np.isfinite(features).all(), "features are not finite"
    scale = np.abs(features).max()
    assert np.abs(features[0] - features[1]).max() > 1e-3 * scale, "two images have the same features"
    assert np.array_equal(plain.features(pixels), features), "the same batch has other features the second time"
    assert hash_state(module) == before, "computing features changes the network"
    for rows in ([0], [3, 1, 2]):
        alone = plain.features(np.ascontiguousarray(pixels[rows]))
        difference = np.abs(alone - features[rows]).max()
        assert difference <= 1e-5 * scale, "an image's features depend on the other images of its batch"
    reduced = freeze(loaded, transform, "cpu", "bf16").features(pixels)
    cosines = (features * reduced).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(reduced, axis=1)
    assert reduced.dtype == np.float32, f"features in bf16 are {reduced.dtype}, not float32"
    assert cosines.min() >= 0.999, f"features in bf16 have a cosine of {cosines.min():.4f} to those in fp32"
    viewed = freeze(loaded, transform, "cpu", "fp32", views=2, augment="patch")
    _check_views(plain, viewed, pixels[:3])


def _check_row(loaded: LoadedBackbone, backbone: str | Backbone | LoadedBackbone) -> None:
    spec = loaded.spec
    if isinstance(backbone, str):
        assert spec == find_backbone(backbone), f"the loaded backbone is not the one named {backbone}"
    count = sum(parameter.numel() for parameter in loaded.module.parameters())
    assert count == spec.parameters, f"the network has {count:,} parameters, not {spec.parameters:,}"
    for name, text in (("network", spec.network), ("license", spec.license), ("source", spec.source)):
        assert text, f"the {name} is empty"
    assert len(loaded.weights_sha256) == 64, "the digest of the weights is not a sha256"
    assert loaded.weights_source, "the source of the weights is empty"
    assert not any(module.training for module in loaded.module.modules()), "the network is not in eval mode"
    assert not any(p.requires_grad for p in loaded.module.parameters()), "the network is not frozen"


def _check_views(plain: FrozenNetwork, viewed: FrozenNetwork, pixels: np.ndarray) -> None:
    """The first of several views is the plain row, bit for bit."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(Path(folder) / f"{index}.png")
        sources = [Source(str(index), f"{index}.png", -1) for index in range(len(pixels))]
        ((one,), (several,)) = (
            compute_shard(Path(folder), sources, [network], batch_size=2, pool=pool) for network in (plain, viewed)
        )
    dim = plain.backbone.spec.dim
    assert one.features.shape == (len(pixels), dim), f"a shard has shape {one.features.shape}"
    assert several.features.shape == (len(pixels), 2, dim), f"a shard of views has shape {several.features.shape}"
    assert np.array_equal(several.features[:, 0], one.features), "the first view differs from the plain features"
    assert one.digests == several.digests, "digests depend on the number of views"


def _draw(count: int, size: tuple[int, int]) -> np.ndarray:
    """Different images of large squares, uint8 (count, *size, 3)."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    rows, columns = (np.arange(side) * 4 // side for side in size)
    return np.ascontiguousarray(coarse[:, rows][:, :, columns])
