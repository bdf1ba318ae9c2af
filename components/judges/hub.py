"""Judges by name from torchvision, timm or Hugging Face, where the package and, once, the network are there.

The artifact keeps the weights, so that whoever scores needs no network and sees the same ones.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.judges.classes import Classes, imagenet_classes
from components.judges.judge import Judge, JudgeInput
from components.task_config import Answer

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "weights.safetensors"
Made = tuple["nn.Module", JudgeInput, Classes]

HF_CLASSES: Mapping[str, str] = {
    "classes": "AutoModelForImageClassification",
    "depth": "AutoModelForDepthEstimation",
    "segments": "AutoModelForSemanticSegmentation",
    "features": "AutoModel",
}


class HubJudge(Judge):
    """A network of a package and the function that reads its output."""

    def __init__(self, made: Made, read: "Callable[[nn.Module, Tensor], dict[str, Tensor]]", answer: Answer) -> None:
        self._network, self.input, self.classes = made
        self._network.requires_grad_(False).eval()
        self._read, self.answers = read, (answer,)

    def answer(self, images: "Tensor") -> "dict[str, Tensor]":
        """The network's answer."""
        return self._read(self._network, images)

    def to(self, device: str) -> None:
        """Move the network."""
        self._network.to(device)

    def save(self, folder: str) -> None:
        """Weights; of Hugging Face also the files that describe the network."""
        if hasattr(self._network, "save_pretrained"):
            self._network.save_pretrained(folder, safe_serialization=True)
            return
        from safetensors.torch import save_model

        save_model(self._network, str(Path(folder) / FILE))


def build_hub_judge(spec: str, answer: Answer, folder: str | None, given: JudgeInput | None) -> HubJudge:
    """The judge ``spec`` names; from its artifact's ``folder`` with what it sees, ``given``, or fetched where None.

    Raises ValueError, with what to install, without the package, and when the weights can't be fetched.
    """
    kind, _, name = spec.partition(":")
    make, read = {"torchvision": (_torchvision, _read_torchvision), "timm": (_timm, _read_timm), "hf": (_hf, _read_hf)}[
        kind
    ]
    try:
        return HubJudge(make(name, answer, folder, given), lambda net, images: read(net, images, answer), answer)
    except ImportError as error:
        package = "transformers" if kind == "hf" else kind
        raise ValueError(f"judge {spec!r}: the package isn't installed, pip install {package}") from error
    except Exception as error:  # each package and its downloader have errors of their own
        said = next(iter(str(error).splitlines()), "")
        raise ValueError(f"judge {spec!r}: it can't be fetched: {type(error).__name__}: {said}"[:400]) from error


def _torchvision(name: str, answer: Answer, folder: str | None, given: JudgeInput | None) -> Made:
    models = import_module("torchvision.models")
    if folder is None:
        weights = models.get_model_weights(name).DEFAULT
        preset = weights.transforms()
        size = (getattr(preset, "crop_size", None) or preset.resize_size)[0]
        seen = JudgeInput(size, tuple(preset.mean), tuple(preset.std))
        categories = weights.meta["categories"]
        classes = imagenet_classes() if len(categories) == 1000 else tuple((label,) for label in categories)
        return models.get_model(name, weights=weights), seen, classes
    from safetensors import safe_open

    with safe_open(Path(folder) / FILE, "pt") as file:
        helped = any(key.startswith("aux_classifier") for key in file.keys())  # noqa: SIM118
    bare = {"weights_backbone": None} if answer == "segments" else {}
    return _filled(
        models.get_model(name, weights=None, **bare, **({"aux_loss": True} if helped else {})), folder, given
    )


def _read_torchvision(network: Any, images: "Tensor", answer: Answer) -> "dict[str, Tensor]":
    if answer != "features":
        output = network(images)
        return {answer: output["out"] if answer == "segments" else output}
    import torch

    last = [part for part in network.modules() if isinstance(part, torch.nn.Linear)][-1]
    read: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        network(images)
    finally:
        hook.remove()
    return {"features": read[0].flatten(1)}


def _timm(name: str, answer: Answer, folder: str | None, given: JudgeInput | None) -> Made:
    timm = import_module("timm")
    if folder is not None:
        return _filled(timm.create_model(name, pretrained=False), folder, given)
    network = timm.create_model(name, pretrained=True)
    data = timm.data.resolve_model_data_config(network)
    classes = imagenet_classes() if network.num_classes == 1000 else ()
    return network, JudgeInput(data["input_size"][-1], tuple(data["mean"]), tuple(data["std"])), classes


def _read_timm(network: Any, images: "Tensor", answer: Answer) -> "dict[str, Tensor]":
    if answer == "classes":
        return {"classes": network(images)}
    return {"features": network.forward_head(network.forward_features(images), pre_logits=True).flatten(1)}


def _hf(name: str, answer: Answer, folder: str | None, given: JudgeInput | None) -> Made:
    transformers = import_module("transformers")
    auto = getattr(transformers, HF_CLASSES[answer])
    if folder is not None:
        assert given is not None
        return auto.from_pretrained(folder, use_safetensors=True), given, ()
    network = auto.from_pretrained(name, use_safetensors=True)
    processor = transformers.AutoImageProcessor.from_pretrained(name).to_dict()
    size = processor.get("crop_size") or processor["size"]
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    mean, std = processor.get("image_mean", (0.0,) * 3), processor.get("image_std", (1.0,) * 3)
    labels = getattr(network.config, "id2label", {}) if answer == "classes" else {}
    classes = tuple(tuple(part.strip() for part in labels[number].split(",")) for number in sorted(labels))
    return network, JudgeInput(side, tuple(mean), tuple(std)), classes


def _read_hf(network: Any, images: "Tensor", answer: Answer) -> "dict[str, Tensor]":
    if answer == "features" and hasattr(network, "get_image_features"):  # CLIP and its like
        found = network.get_image_features(pixel_values=images)
        return {"features": getattr(found, "pooler_output", found)}
    output = network(pixel_values=images)
    if answer == "depth":
        return {"depth": output.predicted_depth}
    if answer != "features":
        return {answer: output.logits}
    pooled = getattr(output, "pooler_output", None)
    return {"features": (output.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1)}


def _filled(network: "nn.Module", folder: str, given: JudgeInput | None) -> Made:
    from safetensors.torch import load_model

    assert given is not None
    load_model(network, str(Path(folder) / FILE))
    return network, given, ()
