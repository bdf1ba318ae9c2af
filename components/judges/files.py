"""Judges from one file: TorchScript or ONNX. The artifact keeps a copy.

Both see images as ``judge_options`` says (size, mean, std; unless it does, [0, 1] at the images' own size) and return
one tensor, or several by the names of judge.RANKS.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.judges.classes import Classes
from components.judges.judge import RANKS, Judge, JudgeInput
from components.task_config import Answer

if TYPE_CHECKING:
    from torch import Tensor

FILES: Mapping[str, str] = {"torchscript": "model.pt", "onnx": "model.onnx"}  # names in the artifact


class TorchScriptJudge(Judge):
    """A module saved with ``torch.jit.save``."""

    def __init__(self, path: str, *, answer: Answer, given: JudgeInput, classes: Classes) -> None:
        import torch

        self.answers, self.input, self.classes, self._path = (answer,), given, classes, path
        try:
            self._network = torch.jit.load(_existing(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"judge 'torchscript:{path}': no TorchScript file: {_first_line(error)}") from error

    def answer(self, images: "Tensor") -> "dict[str, Tensor]":
        """What the module returns."""
        return _named(self._network(images), self.answers[0])

    def to(self, device: str) -> None:
        """Move the module."""
        self._network.to(device)

    def save(self, folder: str) -> None:
        """A copy of the file."""
        shutil.copy(self._path, Path(folder) / FILES["torchscript"])


class OnnxJudge(Judge):
    """A model of one input, run by onnxruntime on a CPU thread."""

    def __init__(self, path: str, *, answer: Answer, given: JudgeInput, classes: Classes) -> None:
        self.answers, self.input, self.classes, self._path = (answer,), given, classes, path
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"judge 'onnx:{path}': it is run by onnxruntime, pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(_existing(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class but this one
            raise ValueError(f"judge 'onnx:{path}': no ONNX model: {_first_line(error)}") from error

    def answer(self, images: "Tensor") -> "dict[str, Tensor]":
        """What the model returns, on the images' device."""
        import torch

        outputs = self._session.run(None, {self._session.get_inputs()[0].name: images.cpu().numpy()})
        tensors = [torch.from_numpy(output).to(images.device) for output in outputs]
        names = [output.name for output in self._session.get_outputs()]
        known = {name: tensor for name, tensor in zip(names, tensors, strict=True) if name in RANKS}
        return _named(known or tensors[0], self.answers[0])

    def save(self, folder: str) -> None:
        """A copy of the file."""
        shutil.copy(self._path, Path(folder) / FILES["onnx"])


def _existing(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"judge: there is no file {path!r}")
    return path


def _named(output: Any, answer: Answer) -> "dict[str, Tensor]":
    """One tensor is ``answer``; depth may have a channel of its own."""
    answers = dict(output) if isinstance(output, Mapping) else {answer: output}
    if "depth" in answers and answers["depth"].ndim == 4:
        answers["depth"] = answers["depth"][:, 0]
    return answers


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
