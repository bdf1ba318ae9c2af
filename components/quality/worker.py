"""Features of originals and of their reconstructions at every budget, for the sampled images.

Legend: N images, K budgets, F features, L tokens, D numbers in a token.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from components.images import stack, to_float
from components.mapping import Totals, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

EFFICIENTNET, INCEPTION = "efficientnet", "inception"


@dataclass(frozen=True)
class Wanted:
    """What an actor is built from."""

    tokenizer_uri: str
    names: frozenset[str]
    inception: str | None


class Featurizer:
    """A row a sampled image: ``<network>_original`` [F], ``<network>_restored`` [K * F], ``projected`` [all L * D]."""

    def __init__(self, wanted: Wanted) -> None:
        self._names = wanted.names
        self._tokenizer = load_tokenizer(wanted.tokenizer_uri)
        self._device = next(self._tokenizer.parameters()).device
        self._networks = {name: network.to(self._device) for name, network in _networks(wanted.inception).items()}

    def __call__(self, images: pa.Table, codes: pa.Table) -> tuple[pa.Table, Totals]:
        """The rows of the sampled images among these, perhaps none."""
        if images["image_id"] != codes["image_id"]:
            raise AssertionError("images and codes are not the same rows in the same order")
        rows = [row for row, name in enumerate(images["image_id"].to_pylist()) if name in self._names]
        columns: dict[str, np.ndarray] = self._measured(images.take(rows), codes.take(rows)) if rows else {}
        names = [f"{network}_{side}" for network in self._networks for side in ("original", "restored")]
        lists = {name: pa.array(list(columns.get(name, ())), pa.list_(pa.float32())) for name in [*names, "projected"]}
        return pa.table({"image_id": images["image_id"].take(pa.array(rows, pa.int64())), **lists}), {"rows": len(rows)}

    def _measured(self, images: pa.Table, codes: pa.Table) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            originals = to_float(torch.from_numpy(stack(images["image"].to_pylist())).to(self._device))
            restored = [self._decoded(codes, column) for column in range(len(self._tokenizer.budgets))]
            steps = self._tokenizer.rollout(originals)
            parts = {"projected": torch.cat([step.projected.flatten(1).float() for step in steps], dim=1)}
            for name, network in self._networks.items():
                parts[f"{name}_original"] = _embedded(network, originals)
                parts[f"{name}_restored"] = torch.cat([_embedded(network, images) for images in restored], dim=1)
        return {name: part.cpu().numpy() for name, part in parts.items()}

    def _decoded(self, codes: pa.Table, column: int) -> "Tensor":
        """The images at a budget, as score decodes them."""
        from model.tokens import TokenBatch

        config, budgets = self._tokenizer.config, self._tokenizer.budgets
        flat = codes["codes"].combine_chunks().flatten().to_numpy().reshape(len(codes), -1)
        width = flat.shape[1] // sum(budgets)
        start = sum(budgets[:column]) * width
        part = flat[:, start : start + budgets[column] * width]
        tokens = part if config.codebook_size else part.reshape(len(part), budgets[column], width)
        return self._tokenizer.decode(TokenBatch.from_numpy(list(tokens), config.codebook_size))


def _embedded(network: "Callable[[Tensor], Tensor]", images: "Tensor") -> "Tensor":
    """Features [N, F]; on a CPU image by image, since convolutions round differently in a batch of another size."""
    import torch

    if images.device.type != "cpu":
        return network(images)
    return torch.cat([network(image[None]) for image in images])


def _networks(inception: str | None) -> "Mapping[str, nn.Module]":
    from torch import nn

    from model.efficientnet import EfficientNetLite0
    from model.weights import efficientnet_weights

    class Embedding(nn.Module):
        """The pooled features of EfficientNet-Lite0."""

        def __init__(self) -> None:
            super().__init__()
            self.network = EfficientNetLite0.load(efficientnet_weights())

        def forward(self, images: "Tensor") -> "Tensor":
            return self.network.embed(images)

    networks: dict[str, nn.Module] = {EFFICIENTNET: Embedding().eval()}
    return networks if inception is None else networks | {INCEPTION: load_inception(inception)}


def load_inception(file: str) -> "nn.Module":
    """torch-fidelity's Inception with the weights in ``file`` (its own .pth, or .safetensors): images to [N, 2048].

    Raises ValueError when torch-fidelity can't be imported or the weights aren't its own.
    """
    import torch
    from torch import nn

    from model.files import load_tensors

    tensors = load_tensors(file)
    extractor = _fidelity_inception()
    with tempfile.TemporaryDirectory() as folder:  # torch-fidelity unpickles whatever it is given: it gets our own file
        clean = Path(folder, "inception.pth")
        torch.save(dict(tensors), clean)
        try:
            network = extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(clean))
        except RuntimeError as error:
            raise ValueError(f"quality.inception = {file!r}: not the weights of torch-fidelity: {error}") from error

    class Embedding(nn.Module):
        """uint8 in, as the weights were made for."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: "Tensor") -> "Tensor":
            (features,) = self.network((images * 255).round().to(torch.uint8))
            return features

    return Embedding().eval()


def _fidelity_inception() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
        needed = "pip install torch-fidelity, and a torchvision made for this torch"
        raise ValueError(f"quality.inception: torch-fidelity can't be imported ({error}); {needed}") from error
    return FeatureExtractorInceptionV3
