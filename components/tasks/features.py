"""Whether an embedding stays where it was.

Legend: B batch, N images of the gallery, D numbers in an embedding.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from components.task_config import Answer
from components.tasks.task import Direction, Originals, Seen, Task

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = (1, 5)


class Features(Task):
    """``cosine``: similarity of the embeddings of original and reconstruction, in -1..1."""

    metrics: Mapping[str, Direction] = {"cosine": "higher"}
    answer: Answer = "features"

    def measure(self, originals: Originals, restored: Seen) -> "Mapping[str, Tensor]":
        """See the class."""
        return {"cosine": (unit(originals.answers["features"]) * unit(restored.answers["features"])).sum(1)}


class Retrieval(Task):
    """``recall1``, ``recall5``: the share of the original's 1 or 5 nearest images that are its reconstruction's too.

    Neighbours are looked for by cosine in a gallery of originals, the image itself left out. ``ids`` [N] and
    ``embeddings`` [N, D] of unit length. NaN where the gallery is too small.
    """

    metrics: Mapping[str, Direction] = {f"recall{number}": "higher" for number in NEIGHBOURS}
    answer: Answer = "features"

    def __init__(self, ids: "list[str]", embeddings: "Tensor") -> None:
        self._row_of, self._gallery_ND = {name: row for row, name in enumerate(ids)}, embeddings

    def measure(self, originals: Originals, restored: Seen) -> "Mapping[str, Tensor]":
        """See the class."""
        before = self._nearest(originals.answers["features"], originals.ids)
        after = self._nearest(restored.answers["features"], originals.ids)
        values = {}
        for number in NEIGHBOURS:
            shared = before[:, :number, None] == after[:, None, :number]
            share = shared.any(2).float().mean(1)
            values[f"recall{number}"] = share if before.shape[1] >= number else share * float("nan")
        return values

    def _nearest(self, features: "Tensor", ids: tuple[str, ...]) -> "Tensor":
        """Rows of the gallery, nearest first, int64 [B, up to 5]."""
        import torch

        self._gallery_ND = self._gallery_ND.to(features.device)
        near_BN = unit(features) @ self._gallery_ND.T
        for row, name in enumerate(ids):
            if name in self._row_of:
                near_BN[row, self._row_of[name]] = -torch.inf
        others = len(self._row_of) - 1  # the image itself may be one of them
        return near_BN.topk(max(0, min(max(NEIGHBOURS), others)), dim=1).indices


def unit(features_BD: "Tensor") -> "Tensor":
    """Rows of unit length."""
    import torch.nn.functional as F

    return F.normalize(features_BD.float(), dim=1)
