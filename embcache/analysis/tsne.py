"""t-SNE maps of cached features (the paper's Figures 2, D1, D2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

from embcache.errors import ProtocolError

PERPLEXITY = 30.0


def embed_tsne(features: ArrayLike, *, seed: int = 0, perplexity: float = PERPLEXITY) -> NDArray[np.float32]:
    """Two-dimensional t-SNE of standardised features, from a PCA initialisation.

    Parameters
    ----------
    features : array-like of shape (n, D)
        Cached features.
    seed : int
        Of the optimisation.
    perplexity : float
        Lowered to a third of the neighbours there are where images are few.

    Returns
    -------
    ndarray of shape (n, 2), float32

    Raises
    ------
    ProtocolError
        Fewer than four images: there is no neighbourhood to keep.
    """
    X = np.asarray(features, dtype=np.float32)
    if len(X) < 4:
        raise ProtocolError("too few images for a t-SNE map", expected="at least 4", found=str(len(X)))
    tsne = TSNE(perplexity=min(perplexity, (len(X) - 1) / 3), init="pca", random_state=seed)
    coordinates: NDArray[np.float32] = tsne.fit_transform(StandardScaler().fit_transform(X)).astype(np.float32)
    return coordinates
