"""Times the tokenizer at full size, phase by phase, beside what the machine can do: ``make bench-model``.

Every row: seconds (the best of the repeats), images a second, where the time went, floating-point operations a second
and their share of a large matrix product timed in the same run. Weights are random, images are real. At bf16 inference
is what ``AlitTokenizer.load(…, precision="bf16")`` does, training what ``precision: bf16`` does: autocast. Nothing is
trained at int8.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from components.config import OptimizerConfig
from components.train.optimizer import build_optimizer
from model import SIZES, AlitTokenizer
from model.config import DistillConfig
from model.inference import PRECISIONS, prepare_for_inference
from model.memory import keep_freed_memory
from model.objectives import DistillObjective, Turn, train_only
from model.recompute import Recompute, recompute_blocks
from model.selection import FixedTokens, Floats, Selection
from tests.bench.machine import PRODUCT, ceilings

PHASES = ("base encode", "rollouts", "decoder", "base decode")
GRIDS_KEPT = "training step, 2 of 8 rollouts, grids kept"
REST = "rest"  # for training: the backward pass and the optimizer
OWN_PROCESS = ("training step", "training step, 2 of 8 rollouts", GRIDS_KEPT, "1024 px, fewest tokens and back")


@dataclass
class Row:
    """One measured case; ``phases``: name to (seconds, operations)."""

    case: str
    images: int
    seconds: float
    operations: float
    peak_gb: float
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class MetAt:
    """A rule that measures as Threshold does and is met after so many rollouts (0: never), whatever the weights."""

    rollout: int
    metric: str = "l1"
    reads_last: bool = False

    def settled(self, values: Floats) -> NDArray[np.bool_]:
        """At its rollout."""
        return np.full(len(values), values.shape[1] == self.rollout)

    def select(self, values: Floats, budgets: tuple[int, ...]) -> Selection:
        """That rollout's budget, or the most tokens."""
        return FixedTokens(budgets[self.rollout - 1]).select(values, budgets)


def _attention(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _int8_product(left: Any, right: Any, **_kwargs: Any) -> int:
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def counting() -> FlopCounterMode:
    """A counter that knows attention on the CPU too (backward: its two halves cost 2.5 times the forward pass)."""
    aten = torch.ops.aten

    def backward(_gradient: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> float:
        return 2.5 * sdpa_flop_count(query, key, value)

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._int_mm: _int8_product,
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


class Meter:
    """Adds up seconds and operations of each phase, by hooks on its module."""

    def __init__(self, tokenizer: AlitTokenizer) -> None:
        self.read: Callable[[], float] = time.perf_counter
        self.total: dict[str, float] = defaultdict(float)
        self.inside: Counter[str] = Counter()  # threads that work on images of their own
        self.lock = Lock()
        modules = (tokenizer.base.encoder, tokenizer.encoder, tokenizer.decoder, tokenizer.base.decoder)
        for name, module in zip(PHASES, modules, strict=True):
            module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            module.register_forward_hook(lambda *_, name=name: self._leave(name))

    def _enter(self, name: str) -> None:
        with self.lock:
            if not self.inside[name]:
                self.total[name] -= self.read()
            self.inside[name] += 1

    def _leave(self, name: str) -> None:
        with self.lock:
            self.inside[name] -= 1
            if not self.inside[name]:
                self.total[name] += self.read()

    def run(self, work: Callable[[], None], read: Callable[[], float]) -> tuple[float, dict[str, float]]:
        """What ``work`` cost in all and by phase, in the units of ``read``."""
        self.read = read
        self.total.clear()
        before = read()
        work()
        return read() - before, dict(self.total)


def photographs(batch: int, side: int) -> Tensor:
    """Real images [B, 3, side, side] in [0, 1]."""
    from skimage import data

    shots = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    images = []
    for number in range(batch):
        shot = shots[number % len(shots)]
        square = torch.from_numpy(shot[: min(shot.shape[:2]), : min(shot.shape[:2])].copy()).permute(2, 0, 1)[None]
        images.append(F.interpolate(square.float() / 255, size=(side, side), mode="bilinear", antialias=True))
    return torch.cat(images)


@torch.no_grad()
def everything(tokenizer: AlitTokenizer, images: Tensor) -> None:
    """All budgets with all reconstructions."""
    for step in tokenizer.rollout(images):
        _ = step.codes, step.images


@torch.no_grad()
def codes_only(tokenizer: AlitTokenizer, images: Tensor) -> None:
    """The codes of all budgets, nothing decoded."""
    for step in tokenizer.rollout(images):
        _ = step.codes


def decoded(tokenizer: AlitTokenizer, images: Tensor) -> None:
    """There at the fewest tokens, and back."""
    tokenizer.decode(tokenizer.encode(images, tokenizer.budgets[0]))


def training_step(
    tokenizer: AlitTokenizer, images: Tensor, sampled: int | None, grids_kept: bool = False
) -> Callable[[], None]:
    """Forward, backward and AdamW of distillation."""
    objective = DistillObjective(tokenizer, DistillConfig(sampled_rollouts=sampled)).train()
    train_only(objective, objective.trainable())
    optimizer = build_optimizer(objective.trainable(), OptimizerConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-5

    with torch.no_grad():
        kept = {"grid": tokenizer.base.encode(images).features_BEhw.flatten(1)} if grids_kept else {}

    def step() -> None:
        generator = torch.Generator().manual_seed(24)  # of 8 rollouts it draws the third and the sixth, as on average
        optimizer.zero_grad()
        objective(images, generator, Turn(targets=kept)).total.backward()
        optimizer.step()

    return step


def cases(tokenizer: AlitTokenizer, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Name to work; of training, to what prepares it."""

    first, third = tokenizer.budgets[0], tokenizer.budgets[2]
    return {
        "all budgets, all reconstructions": lambda: everything(tokenizer, images),
        f"encode, met at {first} tokens": lambda: tokenizer.encode(images, MetAt(1)) and None,
        f"encode, met at {third} tokens": lambda: tokenizer.encode(images, MetAt(3)) and None,
        "encode, never met": lambda: tokenizer.encode(images, MetAt(0)) and None,
        "codes of all budgets": lambda: codes_only(tokenizer, images),
        "training step": lambda: training_step(tokenizer, images, None),
        "training step, 2 of 8 rollouts": lambda: training_step(tokenizer, images, 2),
        GRIDS_KEPT: lambda: training_step(tokenizer, images, 2, grids_kept=True),
        "1024 px, fewest tokens and back": lambda: decoded(tokenizer, images),
    }


def measure(case: str, options: argparse.Namespace, tokenizer: AlitTokenizer, images: Tensor) -> Row:
    """Count the operations of one image while warming up, then time the batch."""
    training = "training" in case
    if "1024" in case:
        tokenizer, images = tokenizer.resized((1024, 1024)), photographs(1, 1024)
    keep_freed_memory()
    if training:
        recompute_blocks(tokenizer.train(), options.recompute)
    else:
        prepare_for_inference(tokenizer.eval(), options.dtype)
    meter = Meter(tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training and options.dtype == "bf16"):
        work = prepared(case, tokenizer, images[:1])
        with counting() as counter:
            operations, by_phase = meter.run(work, counter.get_total_flops)
        work = prepared(case, tokenizer, images)
        timed = min((meter.run(work, time.perf_counter) for _ in range(options.repeats)), key=lambda result: result[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    phases = {name: (timed[1].get(name, 0.0), len(images) * by_phase.get(name, 0.0)) for name in PHASES}
    phases[REST] = (timed[0] - sum(timed[1].values()), len(images) * (operations - sum(by_phase.values())))
    return Row(case, len(images), timed[0], len(images) * operations, peak, phases)


def prepared(case: str, tokenizer: AlitTokenizer, images: Tensor) -> Callable[[], None]:
    """The case's work; for training with an optimizer of its own, which the one before must not keep in memory."""
    work = cases(tokenizer, images)[case]
    return work() if "training" in case else work


def in_own_process(case: str, arguments: Sequence[str]) -> Row:
    """A case whose peak memory is of interest, or that changes the weights."""
    command = [sys.executable, "-m", "tests.bench.bench_model", *arguments, "--case", case]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    values = json.loads(done.stdout.splitlines()[-1])
    return Row(**{**values, "phases": {name: tuple(pair) for name, pair in values["phases"].items()}})


def table(rows: list[Row], ceiling: float) -> str:
    """As markdown; each phase: seconds, and its share of the ceiling."""
    lines = [
        "| case | s | images/s | " + " | ".join((*PHASES, REST)) + " | GFLOP/s | of the ceiling | peak GiB |",
        "|---|---|---|" + "---|" * (len(PHASES) + 4),
    ]
    for row in rows:
        phases = [
            f"{seconds:.2f} ({operations / seconds / ceiling:.0%})"
            if operations
            else "-"
            if seconds < 0.005
            else f"{seconds:.2f}"
            for seconds, operations in row.phases.values()
        ]
        speed = row.operations / row.seconds
        lines.append(
            f"| {row.case} | {row.seconds:.2f} | {row.images / row.seconds:.3f} | {' | '.join(phases)} "
            f"| {speed / 1e9:.0f} | {speed / ceiling:.0%} | {row.peak_gb:.1f} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="alit_small", choices=sorted(SIZES))
    parser.add_argument("--side", type=int, default=256, help="of the images, px")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=PRECISIONS)
    parser.add_argument("--recompute", default="none", choices=get_args(Recompute), help="of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip", nargs="*", default=[], help="parts of names of cases to leave out")
    parser.add_argument("--output", type=Path, help="write the rows as JSON too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = replace(SIZES[options.size], image_size=(options.side, options.side))
    tokenizer, images = AlitTokenizer(config).eval(), photographs(options.batch, options.side)
    if options.case:
        print(json.dumps(asdict(measure(options.case, options, tokenizer, images))))
        return
    found = ceilings(options.dtype)
    skip = [*options.skip, *(["training"] if options.dtype == "int8" else [])]
    names = [n for n in cases(tokenizer, images) if not any(part in n for part in skip)]
    rows = []
    for name in names:
        rows.append(
            in_own_process(name, sys.argv[1:]) if name in OWN_PROCESS else measure(name, options, tokenizer, images)
        )
        print(f"{name}: {rows[-1].seconds:.2f} s", file=sys.stderr, flush=True)
    after = ceilings(options.dtype)
    print(f"{options.size}, {options.side} px, batch {options.batch}, {options.dtype}, {options.threads} threads")
    for name in found:
        print(f"ceiling, {name}: {found[name] / 1e9:.0f} GFLOP/s before, {after[name] / 1e9:.0f} after")
    ceiling = max(found[PRODUCT], after[PRODUCT])
    print(table(rows, ceiling))
    if options.output:
        options.output.write_text(json.dumps({"ceiling": ceiling, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
