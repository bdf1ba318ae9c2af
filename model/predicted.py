"""A predicted length: what the first rollout tells about the metric at every budget.

Legend: B batch, L latents of the first rollout, W encoder width, H hidden units, K budgets.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.files import load_folder, save_folder
from model.recipes import LengthHeadConfig
from model.selection import Floats, Selection, Threshold

if TYPE_CHECKING:
    from model.rollout import RolloutStep

FORMAT = "alit-length-head"
FORMAT_VERSION = 1


class LengthHead(nn.Module):
    """Predicts the metric at every budget from the latents of the first rollout.

    Every latent makes its own prediction and the mean of them is the image's. Predictions leave in the metric's own
    units: ``centre`` and ``spread`` are the training set's mean and deviation at each budget.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, config: LengthHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.encoder_width)
        self.expand = nn.Linear(config.encoder_width, config.hidden)
        self.contract = nn.Linear(config.hidden, config.num_budgets)
        self.register_buffer("centre", torch.zeros(config.num_budgets))
        self.register_buffer("spread", torch.ones(config.num_budgets))

    @torch.no_grad()
    def fit_scale(self, values_NK: Tensor) -> None:
        """Take ``centre`` and ``spread`` from the metric's values on the training set; NaN is missing.

        Raises ValueError when a budget has no value at all.
        """
        present = torch.isfinite(values_NK)
        count = present.sum(0)
        if not bool((count > 0).all()):
            raise ValueError(f"values of {self.config.metric!r}: a budget has none, counts are {count.tolist()}")
        centre = values_NK.nan_to_num(0, 0, 0).sum(0) / count
        squares = torch.where(present, (values_NK - centre).square(), 0.0).sum(0) / count
        self.centre.copy_(centre)
        self.spread.copy_(squares.sqrt().clamp(min=1e-6))

    def forward(self, hidden_BLW: Tensor) -> Tensor:
        """``RolloutStep.hidden`` of the first rollout to predicted values float32 [B, K]; no gradient flows into it."""
        hidden_BLH = nn.functional.gelu(self.expand(self.norm(hidden_BLW.detach().float())))
        return self.contract(hidden_BLH).mean(1) * self.spread + self.centre

    def loss(self, hidden_BLW: Tensor, values_BK: Tensor) -> Tensor:
        """:func:`pinball_loss` of the prediction, in deviations, so that every budget weighs the same; scalar."""
        predicted = (self(hidden_BLW) - self.centre) / self.spread
        return pinball_loss(predicted, (values_BK - self.centre) / self.spread, self.config.quantile)

    def save(self, folder: str | Path) -> None:
        """Write the head into ``folder``."""
        save_folder(folder, self.state_dict(), kind=FORMAT, version=FORMAT_VERSION, config=asdict(self.config))

    @classmethod
    def load(cls, folder: str | Path) -> "LengthHead":
        """The head saved in ``folder``, in eval mode; raises ValueError for another or a newer format."""
        config, weights = load_folder(folder, kind=FORMAT, version=FORMAT_VERSION)
        head = cls(LengthHeadConfig(**config))
        head.load_state_dict(weights)
        return head.eval()


def pinball_loss(predicted: Tensor, values: Tensor, quantile: float) -> Tensor:
    """Mean loss whose minimum is the ``quantile`` of the values (0.5: the median); NaN values don't count. Scalar."""
    above = (values - predicted).nan_to_num(0.0)
    present = torch.isfinite(values).sum().clamp(min=1)
    return torch.maximum(quantile * above, (quantile - 1) * above).sum() / present


@dataclass(frozen=True, eq=False)
class PredictedThreshold:
    """:class:`Threshold` on what ``head`` predicts: chosen after one rollout, nothing decoded.

    The fewest tokens whose predicted metric is at most ``max`` (or at least ``min``); if none is, the most tokens. A
    head trained for a high quantile of a distance errs on the side of more tokens.
    """

    head: LengthHead
    max: float | None = None
    min: float | None = None

    def __post_init__(self) -> None:
        self._threshold()

    def _threshold(self) -> Threshold:
        return Threshold(self.head.config.metric, max=self.max, min=self.min)

    @property
    def metric(self) -> str:
        """The metric that is predicted."""
        return self.head.config.metric

    @torch.no_grad()
    def predict(self, first: "RolloutStep") -> NDArray[np.float32]:
        """Predicted values [B, K] from the first rollout."""
        return self.head(first.hidden).float().cpu().numpy()

    def select(self, predicted: Floats, budgets: Sequence[int]) -> Selection:
        """Choose from *predicted* values [N, K]; the selection's ``value`` and ``satisfied`` are predictions too."""
        return self._threshold().select(predicted, budgets)
