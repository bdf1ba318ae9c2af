"""What a task is: what it compares of an image and its reconstruction.

Legend: B batch, H W height and width in px.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from components.task_config import Answer, Target

if TYPE_CHECKING:
    from torch import Tensor

Direction = Literal["lower", "higher"]  # which is better


@dataclass(frozen=True)
class Seen:
    """Images float32 [B, 3, H, W] in [0, 1] and what the task's judge answered; no answers without a judge."""

    images: "Tensor"
    answers: "Mapping[str, Tensor]" = field(default_factory=dict)


@dataclass(frozen=True)
class Originals(Seen):
    """The images as they were, and what is true of them.

    ``labels``: None where missing. ``depth`` float32 [B, H, W] in metres, NaN where missing; ``mask`` int64 [B, H, W],
    -1 where missing; both None unless the task asked for that column.
    """

    ids: tuple[str, ...] = ()
    labels: tuple[str | None, ...] = ()
    depth: "Tensor | None" = None
    mask: "Tensor | None" = None


class Task(ABC):
    """Extend it for a task of your own: name its metrics and measure them.

    ``metrics``: name -> whether lower or higher is better. ``answer``: what it asks of its judge, None for nothing in
    particular. ``target``: the column of the ImageSet it compares with.
    """

    metrics: Mapping[str, Direction] = {}
    answer: Answer | None = None
    target: Target | None = None

    @abstractmethod
    def measure(self, originals: Originals, restored: Seen) -> "Mapping[str, Tensor]":
        """Each metric as float [B], NaN where an image lacks the target.

        On a CPU it is called with one image at a time, so that no value depends on the batch; on a GPU with many.
        """
