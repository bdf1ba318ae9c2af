"""Whole-set measures against plain formulas, on real photographs' features."""

import numpy as np
import pytest
import scipy.linalg
import torch

from components.images import stack, to_float
from components.quality.measures import frechet, kernel, neighbours, probe_top1, recall
from components.quality.worker import load_inception
from model.efficientnet import EfficientNetLite0
from model.weights import efficientnet_weights
from tests.by_hand import photographs


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Of 60 crops, the 40 features that vary most (so that covariances have full rank), float32 [60, 40]."""
    network = EfficientNetLite0.load(efficientnet_weights())
    pixels = to_float(torch.from_numpy(stack([row["image"] for row in photographs(60).rows])))
    with torch.inference_mode():
        found = network.embed(pixels).numpy()
    return found[:, np.argsort(-found.var(axis=0))[:40]]


@pytest.fixture(scope="module")
def others(features: np.ndarray) -> np.ndarray:
    return (features + np.random.default_rng(0).normal(0.1, 0.2, features.shape)).astype(np.float32)


def test_frechet(features: np.ndarray, others: np.ndarray) -> None:
    one, other = np.cov(features.astype(np.float64), rowvar=False), np.cov(others.astype(np.float64), rowvar=False)
    apart = features.mean(axis=0, dtype=np.float64) - others.mean(axis=0, dtype=np.float64)
    expected = apart @ apart + np.trace(one + other - 2 * scipy.linalg.sqrtm(one @ other).real)
    assert frechet(features, others) == pytest.approx(expected, rel=1e-4)
    assert frechet(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet(features[::-1].copy(), others) == pytest.approx(expected, rel=1e-4)


def test_frechet_grows_as_images_get_fewer(features: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(60)
    sizes = [frechet(features[order[:n]], features[order[n : 2 * n]]) for n in (8, 15, 30)]
    assert sizes == sorted(sizes, reverse=True)


def test_kernel_is_the_double_sum_without_pairs(features: np.ndarray, others: np.ndarray) -> None:
    def similarity(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a.astype(np.float64) @ b.astype(np.float64)) / 40 + 1) ** 3

    pairs = [(i, j) for i in range(60) for j in range(60) if i != j]
    expected = np.mean(
        [
            similarity(features[i], features[j])
            + similarity(others[i], others[j])
            - 2 * similarity(features[i], others[j])
            for i, j in pairs
        ]
    )
    assert kernel(features, others) == pytest.approx(expected, rel=1e-6)
    assert kernel(features, features) == pytest.approx(0, abs=1e-9)


def test_probe_learns_what_is_there() -> None:
    labels = [str(row["label"]) for row in photographs(60).rows]
    onehot = np.eye(len(set(labels)))[[sorted(set(labels)).index(label) for label in labels]]
    assert probe_top1(onehot, labels, onehot, labels) == 1
    assert probe_top1(onehot[:10], ["a"] * 10, onehot[:3], ["a"] * 3) is None  # one class says nothing
    assert probe_top1(onehot[:10], list("ababababab"), onehot[:2], ["c", "c"]) == 0


def test_neighbours_and_recall(features: np.ndarray) -> None:
    truth = neighbours(features, 1)[:, 0]
    assert (truth != np.arange(60)).all()
    assert recall(truth, features, 1) == 1
    noise = np.random.default_rng(0).normal(size=(60, 8))
    assert recall(truth, noise, 1) <= recall(truth, noise, 5) < 0.4
    two = np.eye(2)
    assert recall(neighbours(two, 1)[:, 0], two, 1) == 1


def test_inception_weights_are_read_without_running_them(tmp_path) -> None:
    torch.save({"weights": object()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        load_inception(str(tmp_path / "bad.pth"))


def test_inception_of_torch_fidelity(tmp_path) -> None:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        torch.save({}, tmp_path / "empty.pth")
        with pytest.raises(ValueError, match="torch-fidelity"):
            load_inception(str(tmp_path / "empty.pth"))
        pytest.skip(f"torch-fidelity isn't here: {error}")
    empty = {}

    class Unfilled(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            empty.update(self.state_dict())

    (tmp_path / "any.pth").write_bytes(b"")
    torch.save({}, tmp_path / "any.pth")
    Unfilled("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "any.pth"))
    torch.save(empty, tmp_path / "random.pth")
    images = to_float(torch.from_numpy(stack([row["image"] for row in photographs(40).rows[:2]])))
    with torch.inference_mode():
        assert load_inception(str(tmp_path / "random.pth"))(images).shape == (2, 2048)
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights"):
        load_inception(str(tmp_path / "other.pth"))
