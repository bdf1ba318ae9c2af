"""What the machine can do: the ceilings that every speed is measured against."""

import time

import torch
import torch.nn.functional as F

PRODUCT, CONVOLUTION, CHANNELS_LAST = "matrix product", "3x3 convolution", "channels-last"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of a 4096 x 4096 matrix product and of the VQGAN's widest convolution (128 ch., 256 px)."""
    left, right = torch.randn(2, 4096, 4096).to(dtype)
    grid, kernel = torch.randn(1, 128, 256, 256).to(dtype), torch.randn(128, 128, 3, 3).to(dtype)
    last = [part.contiguous(memory_format=torch.channels_last) for part in (grid, kernel)]
    works = {
        PRODUCT: (lambda: left @ right, 2 * 4096**3),
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
