"""How a loaded tokenizer computes: memory format and precision, applied once to its layers, nowhere else.

Convolutions have their weights, and so their activations, channels-last, which is quicker, and but for bf16 those of a
CPU go by tiles (``model/base/convolution.py``). At bf16 linear layers and convolutions hold bfloat16 weights and
multiply in bfloat16 (sums are float32 inside); what is added up, normalised, looked up or compared stays float32, and
so do the three layers whose output is read off: latents before quantization, the decoder's predictions, and pixels. At
int8 linear layers, but for those, multiply whole numbers (``Int8Linear``) and all else is as at fp32: for processors
that have int8 instructions, whether they have bf16 or not. That is for CPUs alone: torch multiplies int8 on CUDA only
for more than 16 rows and sizes that are multiples of 8, and the few tokens of one image are fewer.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from model.base.convolution import Conv3x3

if TYPE_CHECKING:
    from model.tokenizer import AlitTokenizer

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
INT8_MAX = 127


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 with a scale per output, and inputs rounded to int8 with one per token.

    A token's scale is its own and sums are exact in int32, so an image's results don't depend on its batch, as they
    would with one scale a tensor (torch.ao.quantization.quantize_dynamic).
    """

    weight_IO: Tensor
    scale_O: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale_O1 = _scale(layer.weight.detach())
        self.register_buffer("weight_IO", (layer.weight.detach() / scale_O1).round().to(torch.int8).T.contiguous())
        self.register_buffer("scale_O", scale_O1.squeeze(1))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, in] float32 to [..., out] float32."""
        rows_NI = inputs.flatten(0, -2)
        scale_N1 = _scale(rows_NI)
        product_NO = torch._int_mm((rows_NI / scale_N1).round().to(torch.int8), self.weight_IO)
        outputs_NO = product_NO * scale_N1 * self.scale_O
        return (outputs_NO if self.bias is None else outputs_NO + self.bias).view(*inputs.shape[:-1], -1)


def _scale(rows: Tensor) -> Tensor:
    """What each row [N, I] is divided by to lie in the range of int8, [N, 1]."""
    return rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny) / INT8_MAX


def prepare_for_inference(tokenizer: "AlitTokenizer", precision: Precision, device: str | torch.device = "cpu") -> None:
    """Make ``tokenizer`` quick, in place, for ``device``, where it will be.

    There is no way back to fp32, so at another precision it is neither trained nor saved. Raises ValueError for one
    that isn't known, or that the device doesn't compute at.
    """
    allowed = [one for one in PRECISIONS if one != "int8" or torch.device(device).type == "cpu"]
    if precision not in allowed:
        raise ValueError(f"precision = {precision!r} on device = {str(device)!r}: allowed are {allowed}")
    tokenizer.precision = precision
    exact = {id(weight) for weight in _read_off(tokenizer)}
    for layer in list(tokenizer.modules()):
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        if isinstance(layer, Conv3x3):
            layer.convolve_by_tiles(precision != "bf16" and torch.device(device).type == "cpu")
        if precision == "bf16" and isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm):
            layer.register_forward_pre_hook(_in_its_own_type)
            if id(layer.weight) not in exact:
                layer.to(torch.bfloat16).requires_grad_(False)
        for name, child in layer.named_children() if precision == "int8" else ():
            if isinstance(child, nn.Linear) and id(child.weight) not in exact:
                setattr(layer, name, Int8Linear(child))


def _read_off(tokenizer: "AlitTokenizer") -> list[Tensor]:
    """Weights of the layers that stay float32."""
    layers = (tokenizer.encoder.project, tokenizer.decoder.head[-1])
    return [*(layer.weight for layer in layers if isinstance(layer, nn.Linear)), tokenizer.base.last_layer]


def _in_its_own_type(layer: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(layer.weight.dtype),)
