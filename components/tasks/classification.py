"""Whether a classifier still sees what it saw."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from components.task_config import Answer, Target
from components.tasks.task import Direction, Originals, Seen, Task

if TYPE_CHECKING:
    from torch import Tensor


class Classification(Task):
    """``classes``: for each class of the judge the labels that mean it.

    ``correct``: 1 where the judge's class of the reconstruction is the label's, else 0. ``agreement``: 1 where it is
    the judge's own of the original. ``probability``: what the judge gives the class that it saw on the original, in
    0..1. ``probability_label``: what it gives the label's. A label that no class means is missing.
    """

    metrics: Mapping[str, Direction] = dict.fromkeys(
        ("correct", "agreement", "probability", "probability_label"), "higher"
    )
    answer: Answer = "classes"
    target: Target = "label"

    def __init__(self, classes: Sequence[Sequence[str]]) -> None:
        self._class_of, self.num_classes = class_numbers(classes), len(classes)

    def class_of(self, label: str | None) -> int | None:
        """The class that ``label`` means; None where it means none, or several."""
        return self._class_of.get(normal(label))

    def measure(self, originals: Originals, restored: Seen) -> "Mapping[str, Tensor]":
        """See the class."""
        import torch

        before, scores = originals.answers["classes"].argmax(1), restored.answers["classes"].float()
        numbers = [self.class_of(label) for label in originals.labels]
        labels = torch.tensor([-1 if number is None else number for number in numbers]).to(scores.device)
        unknown = labels < 0
        probabilities, after = scores.softmax(1), scores.argmax(1)
        return {
            "correct": (after == labels).float().masked_fill(unknown, torch.nan),
            "agreement": (after == before).float(),
            "probability": probabilities.gather(1, before[:, None])[:, 0],
            "probability_label": probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(
                unknown, torch.nan
            ),
        }


def class_numbers(classes: Sequence[Sequence[str]]) -> dict[str | None, int]:
    """Normalised label -> class. A label that means several classes is left out, it says too little."""
    found: dict[str | None, set[int]] = {}
    for number, labels in enumerate(classes):
        for label in labels:
            found.setdefault(normal(label), set()).add(number)
    return {label: numbers.pop() for label, numbers in found.items() if len(numbers) == 1}


def normal(label: str | None) -> str | None:
    """``label`` without regard to case, and with spaces for underscores."""
    return None if label is None else " ".join(label.replace("_", " ").lower().split())
