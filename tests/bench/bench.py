"""`make bench`: the tokenizer's speed in one table, beside the authors' code and what the machine can do.

The authors' code was timed once, on a machine whose matrix product in float32 is AUTHORS_PRODUCT; its seconds are
scaled by the same product timed here, in this run. Every case has a process of its own. bf16 is left out where it is no
faster.
"""

import argparse
import sys
from dataclasses import dataclass

import torch

from tests.bench.bench_model import PHASES, REST, Row
from tests.bench.bench_model import in_own_process as measured
from tests.bench.machine import CHANNELS_LAST, CONVOLUTION, PRODUCT, TYPES, ceilings
from tests.bench.precision_error import error_table

AUTHORS_PRODUCT = 210e9  # operations a second in float32, where their code was timed


@dataclass(frozen=True)
class Case:
    """A case of bench_model, the authors' seconds for its work or for the least of theirs that does it, our targets."""

    name: str
    batch: int
    authors_s: float
    target: dict[str, float]  # ratio by precision
    recompute: str = "none"

    @property
    def label(self) -> str:
        """The name, with what isn't the default."""
        return self.name if self.recompute == "none" else f"{self.name}, recompute: {self.recompute}"


CASES = (
    Case("all budgets, all reconstructions", 4, 52.1, {"fp32": 1.15, "bf16": 3}),
    Case("encode, met at 32 tokens", 4, 52.1, {"fp32": 6, "bf16": 18}),
    Case("codes of all budgets", 4, 52.1, {"fp32": 3, "bf16": 9}),
    Case("training step", 2, 44.1, {"fp32": 1.1, "bf16": 2.5}),
    Case("training step", 2, 44.1, {"fp32": 1.1, "bf16": 2.5}, "light"),
    Case("training step, 2 of 8 rollouts", 2, 44.1, {"fp32": 1.6, "bf16": 5}),
)


def line(case: Case, precision: str, row: Row, machine: dict[str, dict[str, float]]) -> str:
    """One row of the table."""
    authors_s = case.authors_s * AUTHORS_PRODUCT / machine["fp32"][PRODUCT]
    product = machine[precision][PRODUCT]
    ratio, target = authors_s / row.seconds, case.target[precision]
    shares = (f"{speed / seconds / product:.0%}" if speed else "-" for seconds, speed in row.phases.values())
    verdict = "met" if ratio >= target else "missed"
    seconds = f"{row.seconds:.1f} | {authors_s:.1f} | {ratio:.2f} | {target:g}, {verdict}"
    return f"| {case.label} | {precision} | {case.batch} | {seconds} | {' | '.join(shares)} | {row.peak_gb:.1f} |"


def machine_table(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> str:
    """Ceilings by precision, before and after."""
    lines = ["| GFLOP/s before, after | " + " | ".join(before) + " |", "|---|" + "---|" * len(before)]
    for name in (PRODUCT, CONVOLUTION, CHANNELS_LAST):
        pairs = (f"{before[kind][name] / 1e9:.0f}, {after[kind][name] / 1e9:.0f}" for kind in before)
        lines.append(f"| {name} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def best(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The better of two measurements of each ceiling."""
    return {kind: {name: max(value, after[kind][name]) for name, value in before[kind].items()} for kind in before}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of cases")
    parser.add_argument("--precision", nargs="*", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokenizer", help="folder of a trained one, for the error of bf16 (default: the starter)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = {kind: ceilings(dtype) for kind, dtype in TYPES.items()}
    faster = before["bf16"][PRODUCT] > before["fp32"][PRODUCT]
    rows = []
    for case in (case for case in CASES if any(part in case.label for part in options.only)):
        for precision in (kind for kind in options.precision if kind == "fp32" or faster):
            settings = {"batch": case.batch, "dtype": precision, "recompute": case.recompute}
            arguments = [f"--{name}={value}" for name, value in {**settings, "threads": options.threads}.items()]
            rows.append((case, precision, measured(case.name, arguments)))
            print(f"{case.label}, {precision}: {rows[-1][2].seconds:.1f} s", file=sys.stderr, flush=True)
    after = {kind: ceilings(dtype) for kind, dtype in TYPES.items()}
    print(machine_table(before, after))
    shares = " | ".join(f"{name} of the product" for name in (*PHASES, REST))
    print(f"\n| case | precision | batch | s | authors, scaled, s | ratio | target | {shares} | peak GB |")
    print("|---|---|---|---|---|---|---|" + "---|" * (len(PHASES) + 2))
    for case, precision, row in rows:
        print(line(case, precision, row, best(before, after)))
    print(f"\n{error_table(options.tokenizer)}")


if __name__ == "__main__":
    main()
