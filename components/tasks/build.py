"""The task that a config names."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from components.judges.record import JudgeRecord
from components.plugins import load_class
from components.task_config import TASK_KINDS
from components.tasks.classification import Classification
from components.tasks.depth import Depth
from components.tasks.features import Features, Retrieval
from components.tasks.segmentation import Segmentation
from components.tasks.task import Task

if TYPE_CHECKING:
    from torch import Tensor


def build_task(kind: str, judge: str | None) -> Task:
    """A task of ``kind``; ``judge``: the local folder of its Judge artifact, None without one.

    Raises ValueError for a class of one's own that isn't there or is no Task.
    """
    if kind not in TASK_KINDS:
        return load_class(kind, Task)()
    assert judge is not None
    record = JudgeRecord.read(judge)
    if kind == "classification":
        return Classification(record.classes)
    if kind == "depth":
        return Depth()
    if kind == "segmentation":
        return Segmentation(record.options["ignore"])
    return Features() if kind == "features" else Retrieval(*read_gallery(judge))


def read_gallery(folder: str) -> tuple[list[str], "Tensor"]:
    """Ids and embeddings of the gallery that a Judge artifact keeps."""
    from safetensors.torch import load_file

    ids = json.loads(Path(folder, "gallery.json").read_text())
    return ids, load_file(Path(folder, "gallery.safetensors"))["embeddings"]
