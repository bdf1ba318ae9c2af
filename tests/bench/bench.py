"""`make bench`: the tokenizer's speed in one table, beside the authors' code and what the machine can do.

The authors' code was timed once, on a machine whose matrix product in float32 is AUTHORS_PRODUCT; its seconds are
scaled by the same product timed here, around each case; that is what targets are for. Machines differ in how
convolutions go beside products, so a second figure scales the base tokenizer's share by a convolution's ceiling. "At
the ceiling" is the ratio that there would be if all of a case's products ran as fast as that one and nothing else took
time: a target above it needs another machine, or fewer products. Every case has a process of its own. bf16 and int8 are
left out where they are no faster; nothing is trained at int8.
"""

import argparse
from dataclasses import dataclass

import torch

from model.inference import PRECISIONS, Precision
from tests.bench.bench_model import GRIDS_KEPT, PHASES, REST, Row
from tests.bench.bench_model import in_own_process as measured
from tests.bench.machine import CHANNELS_LAST, CONVOLUTION, CONVOLVED_AT, PRODUCT, ceilings
from tests.bench.precision_error import error_table

Machine = dict[Precision, dict[str, float]]  # precision -> ceiling -> operations a second
AUTHORS_PRODUCT = 210e9  # operations a second in float32, where their code was timed
AUTHORS_CONVOLUTION = 310e9


@dataclass(frozen=True)
class Case:
    """A case of bench_model, the authors' seconds for its work or for the least of theirs that does it, our targets.

    ``authors_s``: in the base tokenizer, and elsewhere.
    """

    name: str
    batch: int
    authors_s: tuple[float, float]
    target: dict[Precision, float]  # ratio, where there is a target
    recompute: str = "none"

    @property
    def label(self) -> str:
        """The name, with what isn't the default."""
        return self.name if self.recompute == "none" else f"{self.name}, recompute: {self.recompute}"


CASES = (
    Case("all budgets, all reconstructions", 4, (24.5, 27.6), {"fp32": 1.15, "bf16": 3}),
    Case("encode, met at 32 tokens", 4, (24.5, 27.6), {"fp32": 6, "bf16": 18}),
    Case("codes of all budgets", 4, (24.5, 27.6), {"fp32": 3, "bf16": 9}),
    Case("training step", 2, (0.7, 43.4), {"fp32": 1.1, "bf16": 2.5}),
    Case("training step", 2, (0.7, 43.4), {"fp32": 1.1, "bf16": 2.5}, "light"),
    Case("training step", 2, (0.7, 43.4), {"fp32": 1.1, "bf16": 2.5}, "medium"),
    Case("training step, 2 of 8 rollouts", 2, (0.7, 43.4), {"fp32": 1.6, "bf16": 5}),
    Case(GRIDS_KEPT, 2, (0.7, 43.4), {"fp32": 1.6, "bf16": 5}),
)


def line(case: Case, precision: Precision, row: Row, ceiling: Machine) -> str:
    """One row of the table; ``ceiling``: the better of its ceilings just before and just after."""
    slower = [AUTHORS_CONVOLUTION / ceiling["fp32"][CONVOLUTION], AUTHORS_PRODUCT / ceiling["fp32"][PRODUCT]]
    authors_s = sum(case.authors_s) * slower[1]
    by_part_s = sum(seconds * factor for seconds, factor in zip(case.authors_s, slower, strict=True))
    ratio, target = authors_s / row.seconds, case.target.get(precision)
    least_s = {
        phase: operations / ceiling[CONVOLVED_AT[precision] if "base" in phase else precision][PRODUCT]
        for phase, (_, operations) in row.phases.items()
    }
    shares = (f"{least / row.phases[phase][0]:.0%}" if least else "-" for phase, least in least_s.items())
    verdict = "none" if target is None else f"{target:g}, {'met' if ratio >= target else 'missed'}"
    at_most = authors_s / sum(least_s.values())
    compared = (
        f"{authors_s:.1f} | {ratio:.2f} | {verdict} | {at_most:.2f} | {by_part_s:.1f} | {by_part_s / row.seconds:.2f}"
    )
    done = f"{case.label} | {precision} | {case.batch} | {row.seconds:.1f} | {compared}"
    return f"| {done} | {' | '.join(shares)} | {row.peak_gb:.1f} |"


def machine() -> Machine:
    """What the machine can do now."""
    return {kind: ceilings(kind) for kind in PRECISIONS}


def best(before: Machine, after: Machine) -> Machine:
    """The better of two measurements of each ceiling."""
    return {kind: {name: max(value, after[kind][name]) for name, value in before[kind].items()} for kind in before}


def machine_table(found: list[Machine]) -> str:
    """The lowest and the highest of each ceiling; far apart, they say that the machine had other work."""
    lines = ["| GFLOP/s, lowest to highest | " + " | ".join(PRECISIONS) + " |", "|---|" + "---|" * len(PRECISIONS)]
    for name in (PRODUCT, CONVOLUTION, CHANNELS_LAST):
        values = [[one[kind][name] / 1e9 for one in found] for kind in PRECISIONS]
        lines.append(f"| {name} | {' | '.join(f'{min(column):.0f} to {max(column):.0f}' for column in values)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print, each row when it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of cases")
    parser.add_argument("--precision", nargs="*", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--repeats", type=int, default=3, help="of each case; the best counts: the first two make room")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokenizer", help="folder of a trained one, for the tables of errors (default: the starter)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = [machine()]
    products = {kind: ceiling[PRODUCT] for kind, ceiling in found[0].items()}
    kinds = [kind for kind in options.precision if kind == "fp32" or products[kind] > products["fp32"]]
    shares = " | ".join(f"{name} of the product" for name in (*PHASES, REST))
    authors = "authors, s | ratio | target | at the ceiling | authors with convolutions, s | ratio"
    print(f"| case | precision | batch | s | {authors} | {shares} | peak GiB |")
    print("|" + "---|" * (4 + 6 + len(PHASES) + 2), flush=True)
    for case in (case for case in CASES if any(part in case.label for part in options.only)):
        for precision in (kind for kind in kinds if kind != "int8" or "training" not in case.name):
            settings = {"batch": case.batch, "dtype": precision, "recompute": case.recompute}
            settings |= {"repeats": options.repeats, "threads": options.threads}
            row = measured(case.name, [f"--{name}={value}" for name, value in settings.items()])
            found.append(machine())
            print(line(case, precision, row, best(*found[-2:])), flush=True)
    print(f"\n{machine_table(found)}")
    for precision in (kind for kind in kinds if kind != "fp32"):
        print(f"\n{error_table(precision, options.tokenizer)}", flush=True)


if __name__ == "__main__":
    main()
