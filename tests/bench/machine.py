"""What the machine can do: the ceilings that every speed is measured against."""

import time

import torch
import torch.nn.functional as F

from model.inference import PRECISIONS, Precision

PRODUCT, CONVOLUTION, CHANNELS_LAST = "matrix product", "3x3 convolution", "channels-last"
CONVOLVED_AT: dict[Precision, Precision] = {kind: "fp32" if kind == "int8" else kind for kind in PRECISIONS}


def ceilings(precision: Precision) -> dict[str, float]:
    """Operations a second of a 4096 x 4096 matrix product and of the VQGAN's widest convolution (128 ch., 256 px).

    At int8 convolutions are float32, as the tokenizer's are (``CONVOLVED_AT``).
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, 4096, 4096).to(dtype)
    rounded = [(8 * part).to(torch.int8) for part in (left, right)]
    grid, kernel = torch.randn(1, 128, 256, 256).to(dtype), torch.randn(128, 128, 3, 3).to(dtype)
    last = [part.contiguous(memory_format=torch.channels_last) for part in (grid, kernel)]
    works = {
        PRODUCT: (lambda: torch._int_mm(*rounded) if precision == "int8" else left @ right, 2 * 4096**3),
        CONVOLUTION: (lambda: F.conv2d(grid, kernel, padding=1), 18 * 128**2 * 256**2),
        CHANNELS_LAST: (lambda: F.conv2d(*last, padding=1), 18 * 128**2 * 256**2),
    }
    found = {}
    for name, (work, operations) in works.items():
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        found[name] = operations / min(seconds)
    return found
