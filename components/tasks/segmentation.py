"""How well the regions found in the reconstruction lie on the true ones.

Legend: B batch, C classes, H W height and width in px, h w those of the judge's answer.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from components.task_config import Answer, Target
from components.tasks.task import Direction, Originals, Seen, Task

if TYPE_CHECKING:
    from torch import Tensor


class Segmentation(Task):
    """``miou``: intersection over union, a mean over the classes that the mask or the judge sees in *this* image.

    Pixels whose mask is missing or of a class in ``ignore`` don't count. ``miou_judge``: the same against the judge's
    classes on the original, over all pixels.
    """

    metrics: Mapping[str, Direction] = {"miou": "higher", "miou_judge": "higher"}
    answer: Answer = "segments"
    target: Target = "mask"

    def __init__(self, ignore: Sequence[int] = ()) -> None:
        self._ignore = tuple(ignore)

    def measure(self, originals: Originals, restored: Seen) -> "Mapping[str, Tensor]":
        """Where sizes differ, the judge's scores are resized to the mask (bilinear) before the best is taken."""
        import torch

        scores, before = restored.answers["segments"].float(), originals.answers["segments"].float().argmax(1)
        judged = mean_iou(scores.argmax(1), before, scores.shape[1])
        true = originals.mask
        if true is None:
            return {"miou": torch.full_like(judged, torch.nan), "miou_judge": judged}
        found = classes_at(scores, true.shape[1:])
        return {"miou": mean_iou(found, self.counted(true), scores.shape[1]), "miou_judge": judged}

    def counted(self, mask_BHW: "Tensor") -> "Tensor":
        """The mask with -1 where it doesn't count."""
        for number in self._ignore:
            mask_BHW = mask_BHW.masked_fill(mask_BHW == number, -1)
        return mask_BHW


def classes_at(scores_BChw: "Tensor", size: Sequence[int]) -> "Tensor":
    """The best class of each pixel, int64 [B, H, W]."""
    import torch.nn.functional as F

    if tuple(scores_BChw.shape[2:]) != tuple(size):
        scores_BChw = F.interpolate(scores_BChw, size=tuple(size), mode="bilinear", align_corners=False)
    return scores_BChw.argmax(1)


def mean_iou(found_BHW: "Tensor", true_BHW: "Tensor", num_classes: int) -> "Tensor":
    """[B]; pixels where ``true`` is negative don't count, NaN where none does."""
    import torch

    valid = true_BHW >= 0
    classes = max(num_classes, int(true_BHW.max()) + 1)
    values = []
    for found, true, counts in zip(found_BHW, true_BHW, valid, strict=True):
        pairs = torch.bincount(true[counts] * classes + found[counts], minlength=classes * classes)
        both = pairs.view(classes, classes).double()
        union = both.sum(0) + both.sum(1) - both.diagonal()
        values.append((both.diagonal()[union > 0] / union[union > 0]).mean())
    return torch.stack(values).float()
