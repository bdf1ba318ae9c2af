"""How far depth estimated from the reconstruction is off.

Legend: B batch, H W height and width in px, h w those of the judge's answer.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from components.task_config import Answer, Target
from components.tasks.task import Direction, Originals, Seen, Task

if TYPE_CHECKING:
    from torch import Tensor

NEAREST_M = 1e-3  # estimates below count as this, so that a ratio to them is finite


class Depth(Task):
    """Errors over the pixels that have a reading (Eigen et al. 2014).

    ``abs_rel``: mean of |estimate - true| / true. ``rmse``: root of the mean squared error, in metres. ``delta1``: the
    share of pixels with max(estimate / true, true / estimate) < 1.25. The same with ``_judge`` against the judge's
    depth of the original, over all pixels.
    """

    metrics: Mapping[str, Direction] = {
        **dict.fromkeys(("abs_rel", "rmse", "abs_rel_judge", "rmse_judge"), "lower"),
        **dict.fromkeys(("delta1", "delta1_judge"), "higher"),
    }
    answer: Answer = "depth"
    target: Target = "depth"

    def measure(self, originals: Originals, restored: Seen) -> "Mapping[str, Tensor]":
        """Errors; where the two differ in size, the estimate is resized to the truth (bilinear)."""
        estimate, judged = restored.answers["depth"].float(), originals.answers["depth"].float()
        values = {f"{name}_judge": value for name, value in depth_errors(estimate, judged).items()}
        true = originals.depth
        if true is None:
            return {**{name: value * float("nan") for name, value in depth_errors(estimate, judged).items()}, **values}
        return {**depth_errors(estimate, true), **values}


def depth_errors(estimate_Bhw: "Tensor", true_BHW: "Tensor") -> "dict[str, Tensor]":
    """abs_rel, rmse (m), delta1, each [B]; pixels whose truth is NaN or not positive don't count, NaN without any."""
    import torch
    import torch.nn.functional as F

    if estimate_Bhw.shape != true_BHW.shape:
        size = true_BHW.shape[1:]
        estimate_Bhw = F.interpolate(estimate_Bhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    valid = torch.isfinite(true_BHW) & (true_BHW > 0)
    true = torch.where(valid, true_BHW, 1.0)
    found = torch.where(valid, estimate_Bhw.clamp(min=NEAREST_M), 1.0)
    count = valid.flatten(1).sum(1)

    def mean(values: "Tensor") -> "Tensor":
        return torch.where(valid, values, 0.0).flatten(1).sum(1) / count  # 0 / 0 is NaN

    return {
        "abs_rel": mean((found - true).abs() / true),
        "rmse": mean((found - true).square()).sqrt(),
        "delta1": mean((torch.maximum(found / true, true / found) < 1.25).float()),
    }
