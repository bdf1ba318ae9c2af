"""How a loaded tokenizer computes: memory format and precision, applied once to its layers, nowhere else.

Convolutions have their weights, and so their activations, channels-last, which is quicker. At bf16 linear layers and
convolutions hold bfloat16 weights and multiply in bfloat16 (sums are float32 inside); what is added up, normalised,
looked up or compared stays float32, and so do the three layers whose output is read off: latents before quantization,
the decoder's predictions, and pixels.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from model.tokenizer import AlitTokenizer

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def prepare_for_inference(tokenizer: "AlitTokenizer", precision: Precision) -> None:
    """Make ``tokenizer`` quick, in place; from bf16 there is no way back, so it is neither trained nor saved.

    Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision = {precision!r}: allowed are {list(PRECISIONS)}")
    tokenizer.precision = precision
    exact = {id(weight) for weight in _read_off(tokenizer)}
    for layer in tokenizer.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        if precision == "bf16" and isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm):
            layer.register_forward_pre_hook(_in_its_own_type)
            if id(layer.weight) not in exact:
                layer.to(torch.bfloat16).requires_grad_(False)


def _read_off(tokenizer: "AlitTokenizer") -> list[Tensor]:
    """Weights of the layers that stay float32."""
    layers = (tokenizer.encoder.project, tokenizer.decoder.head[-1])
    return [*(layer.weight for layer in layers if isinstance(layer, nn.Linear)), tokenizer.base.last_layer]


def _in_its_own_type(layer: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(layer.weight.dtype),)
