"""What a judge is, and how it is asked.

Legend: B batch, C classes, D numbers in an embedding, H W height and width in px, h w those of an answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.task_config import Answer

if TYPE_CHECKING:
    from torch import Tensor

RANKS: Mapping[str, int] = {"classes": 2, "depth": 3, "segments": 4, "features": 2}  # dimensions of each answer


@dataclass(frozen=True)
class JudgeInput:
    """What a judge wants to see: ``size`` px both sides (None: as the image is), (pixels in [0, 1] - mean) / std."""

    size: int | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def prepare(self, images: "Tensor") -> "Tensor":
        """Images float32 [B, 3, H, W] in [0, 1], resized (bicubic, antialiased, clamped) and normalised."""
        import torch.nn.functional as F

        if self.size is not None and tuple(images.shape[2:]) != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        if self == JudgeInput(self.size):
            return images
        mean, std = images.new_tensor(self.mean).view(3, 1, 1), images.new_tensor(self.std).view(3, 1, 1)
        return (images - mean) / std


class Judge(ABC):
    """Extend it for a judge of your own: say what it sees and answers, and answer.

    ``answers``: which of "classes" (scores before softmax, [B, C]), "depth" (metres, [B, h, w]), "segments" (scores
    [B, C, h, w]) and "features" ([B, D]) it gives. ``classes``: for each class the labels that mean it; without them
    no label can be compared.
    """

    answers: tuple[Answer, ...] = ()
    input: JudgeInput = JudgeInput()
    classes: tuple[tuple[str, ...], ...] = ()

    @abstractmethod
    def answer(self, images: "Tensor") -> "Mapping[str, Tensor]":
        """An entry for each of ``answers``; ``images`` are as ``input`` says, on the device given to :meth:`to`.

        An image's answer must not depend on the others of the batch.
        """

    def to(self, device: str) -> None:
        """Move to ``device``, "cpu" or "cuda"; by default nothing moves."""
        return None

    def save(self, folder: str) -> None:
        """Write what it takes to build it again into ``folder``; by default nothing."""
        return None


def ask(judge: Judge, images: "Tensor") -> "dict[str, Tensor]":
    """``judge``'s answers to images float32 [B, 3, H, W] in [0, 1]; raises ValueError when they have a wrong shape."""
    answers = dict(judge.answer(judge.input.prepare(images)))
    for name in judge.answers:
        shape = tuple(answers[name].shape) if name in answers else None
        if shape is None or len(shape) != RANKS[name] or shape[0] != len(images):
            wanted = f"{RANKS[name]} dimensions, the first {len(images)}"
            raise ValueError(f"{type(judge).__name__} answered {name!r} with shape {shape}: {wanted}, are needed")
    return answers
