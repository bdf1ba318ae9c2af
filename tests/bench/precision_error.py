"""What bf16 and int8 cost: the codes that change, and L1 and PSNR with and without it, on real photographs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import AlitTokenizer
from model.inference import Precision
from model.metrics import METRICS
from model.starter import STARTER


def squares(side: int, number: int = 64) -> Tensor:
    """Squares of photographs at half their size, [number, 3, side, side] in [0, 1]."""
    from skimage import data

    found = []
    for shot in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket()):
        photo = torch.from_numpy(shot.copy()).permute(2, 0, 1).float() / 255
        photo = F.avg_pool2d(photo, 2)
        rows, columns = (range(0, length - side + 1, side * 3 // 4) for length in photo.shape[1:])
        found += [photo[:, y : y + side, x : x + side] for y in rows for x in columns]
    return torch.stack(found[:number])


def errors(precision: Precision, folder: str | None = None) -> list[tuple[int, float, float, float, float, float]]:
    """By budget: tokens, share of codes that change, L1 and PSNR at fp32, and what ``precision`` adds to each."""
    exact, rounded = (AlitTokenizer.load(folder or STARTER, precision=kind) for kind in ("fp32", precision))
    images = squares(exact.config.image_size[0])
    rows = []
    with torch.inference_mode():
        for one, other in zip(exact.rollout(images), rounded.rollout(images), strict=True):
            assert one.codes is not None and other.codes is not None
            scores = {
                name: [METRICS[name](images, step.images.clamp(0, 1)).mean().item() for step in (one, other)]
                for name in ("l1", "psnr")
            }
            (l1, l1_rounded), (psnr, psnr_rounded) = scores["l1"], scores["psnr"]
            changed = (one.codes != other.codes).float().mean().item()
            rows.append((one.num_tokens, changed, l1, l1_rounded - l1, psnr, psnr_rounded - psnr))
    return rows


def error_table(precision: Precision, folder: str | None = None) -> str:
    """As markdown."""
    adds = f"{precision} adds"
    lines = [f"| tokens | codes that {precision} changes | L1, fp32 | {adds} | PSNR, fp32 | {adds} |", "|" + "---|" * 6]
    for tokens, changed, l1, l1_more, psnr, psnr_more in errors(precision, folder):
        lines.append(f"| {tokens} | {changed:.1%} | {l1:.4f} | {l1_more:+.5f} | {psnr:.2f} dB | {psnr_more:+.3f} dB |")
    return "\n".join(lines)
