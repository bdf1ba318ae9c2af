"""Measures over a whole set: Fréchet and kernel distances of features, a linear probe, neighbours.

Legend: N images, F features.
"""

from collections.abc import Sequence

import numpy as np


def frechet(originals: np.ndarray, others: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to the features [N, F] of two sets, by torchmetrics; at least 0.

    The fewer images, the larger: with N below some F the covariances have not full rank. Compare only equal N.
    """
    import torch
    from torch import nn
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(nn.Module):
        num_features = originals.shape[1]

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    distance = FrechetInceptionDistance(feature=Given())
    distance.update(torch.from_numpy(originals).double(), real=True)
    distance.update(torch.from_numpy(others).double(), real=False)
    return max(0.0, distance.compute().item())


def kernel(originals: np.ndarray, others: np.ndarray) -> float:
    """Squared maximum mean discrepancy of features [N, F] with KID's polynomial kernel (arXiv 1801.01401), unbiased.

    Row i of ``others`` is the reconstruction of row i of ``originals``, so a pair isn't independent: it is left out of
    the cross term, where KID, made for independent sets, keeps it. May be below 0.
    """
    from torchmetrics.image.kid import poly_kernel

    one, other = _double(originals), _double(others)
    number = len(one)
    pairs = number * (number - 1)

    def mean(a: object, b: object) -> float:
        matrix = poly_kernel(a, b)
        return float((matrix.sum() - matrix.diagonal().sum()) / pairs)

    return mean(one, one) + mean(other, other) - 2 * mean(one, other)


def _double(features: np.ndarray) -> object:
    import torch

    return torch.from_numpy(features).double()


def probe_top1(
    train: np.ndarray, train_labels: Sequence[str], test: np.ndarray, test_labels: Sequence[str]
) -> float | None:
    """Share of the test rows that a multinomial logistic regression on standardised features gets right.

    None with fewer than two classes to learn. A class that was never learned counts as wrong.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(train_labels)) < 2 or not len(test_labels):
        return None
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, list(train_labels))
    return float(np.mean(fitted.predict(test) == np.asarray(test_labels)))


def neighbours(features: np.ndarray, number: int) -> np.ndarray:
    """Rows of the ``number`` nearest others by cosine similarity, nearest first, int64 [N, number]."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :number]


def recall(truth: np.ndarray, features: np.ndarray, number: int) -> float:
    """Share of images whose true nearest neighbour (``truth`` [N]) is among the ``number`` nearest by ``features``."""
    found = neighbours(features, number)
    return float((found == truth[:, None]).any(axis=1).mean())
