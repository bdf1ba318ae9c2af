"""promote: whether a newly registered tokenizer becomes the champion, by the champion's own result on the same images.

Legend: B images of a batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.artifacts import Figures, ImageSet, Job, Judge, Publication, ScoreTable
from components.config import GateConfig, InferenceResources, PromoteConfig
from components.images import stack, to_float
from components.mapping import Mapping as TableMapping
from components.mapping import Totals, map_table
from components.registry import CHALLENGER, CHAMPION, PREVIOUS, ModelVersion, aliases_of, copy_tokenizer, move_aliases
from components.score.worker import Measuring, Order
from components.scores import budgets_of, larger_is_better, score_files, told_split, values_of
from components.store import join, read_json, read_table, remove, write_json, write_table
from components.task_config import ScoreStageConfig
from components.tracking import Tracker

if TYPE_CHECKING:
    from torch import Tensor

JUDGE = "judge_"


@dataclass(frozen=True)
class Decision:
    """Which alias a new version gets, and why."""

    alias: str
    reason: str


def decide(gate: GateConfig | None, new: float, champion: float, *, larger_is_better: bool) -> Decision:
    """Champion if its mean is better than the champion's by more than the margin; NaN: it couldn't be measured."""
    if gate is None:
        return Decision(CHALLENGER, "no gate is configured")
    told = f"{gate.metric}@{gate.budget} {new:.6g} against the champion's {champion:.6g}"
    gain = (new - champion) if larger_is_better else (champion - new)
    if gain > gate.margin:
        return Decision(CHAMPION, f"{told}: better by {gain:.3g}, more than the margin of {gate.margin:g}")
    return Decision(CHALLENGER, f"{told}: not better by more than the margin of {gate.margin:g}")


def promote(
    job: Job,
    *,
    config: PromoteConfig,
    resources: InferenceResources,
    images: ImageSet,
    scores: ScoreTable,
    publication: Publication,
    **judges: Judge,
) -> Figures:
    """Move ``champion`` (and ``previous``) to the published version, or ``challenger``.

    Writes ``decision.json`` and ``sections.json``. Without a champion it becomes that. Figures: alias, reason, and the
    two means where there is a gate.
    """
    tracker = Tracker(**job.tracking)
    new = ModelVersion.of(publication)
    old = aliases_of(tracker.uri, new.name).get(CHAMPION)
    means: dict[str, float] = {}
    if old in (None, new.version):
        decision = Decision(CHAMPION, "the first one" if old is None else "it was already")
    elif config.gate is None:
        decision = decide(None, np.nan, np.nan, larger_is_better=False)
    else:
        trial = _Trial(config.gate, images, scores, {name.removeprefix(JUDGE): one for name, one in judges.items()})
        decision, means = _compared(trial, job, resources, ModelVersion(new.name, old))
    moves: dict[str, int | None] = {decision.alias: new.version}
    if decision.alias == CHAMPION and old is not None:
        moves[PREVIOUS] = old
    if old != new.version:
        move_aliases(tracker.uri, new.name, to=moves, reason=decision.reason)
    for target in (tracker, tracker.parent):
        target.tags({"alit.alias": decision.alias, "alit.promotion": decision.reason})
        target.metrics({f"promotion/{name}": value for name, value in means.items()})
    told = {"model": new.name, "version": new.version, "champion_before": old, **asdict(decision), **means}
    write_json(join(job.output, "decision.json"), told)
    write_json(join(job.output, "sections.json"), {"sections": [_section(told)]})
    write_table(join(job.output, "table"), pa.Table.from_pylist([told]))
    return {"alias": decision.alias, "reason": decision.reason, "version": new.version, **means}


def _section(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a report shows (the contract of ``sections.json``: components/analyze/sections.py)."""
    finding = f"Version {told['version']} of {told['model']} is now the {told['alias']}: {told['reason']}."
    return {"id": "promotion", "title": "Champion or challenger", "finding": finding}


@dataclass(frozen=True)
class _Trial:
    """What both models are measured by."""

    gate: GateConfig
    images: ImageSet
    scores: ScoreTable
    judges: Mapping[str, Judge]

    @property
    def split(self) -> str:
        """The held-out one, or train where none is held out."""
        return told_split(self.scores)

    def new_values(self) -> dict[str, float]:
        """Image -> the new model's value."""
        at, found = budgets_of(self.scores).index(self.gate.budget), {}
        for _, table in score_files(self.scores, ["image_id", "split", self.gate.metric]):
            values = values_of(table, self.gate.metric, len(budgets_of(self.scores)))[:, at]
            rows = zip(table["image_id"].to_pylist(), table["split"].to_pylist(), values, strict=True)
            found |= {name: float(value) for name, split, value in rows if split == self.split}
        return found


def _compared(
    trial: _Trial, job: Job, resources: InferenceResources, champion: ModelVersion
) -> tuple[Decision, dict[str, float]]:
    """The decision, and both means over the held-out images that both models have a value for."""
    gate, folder = trial.gate, join(job.output, "champion")
    copy_tokenizer(Tracker(**job.tracking).uri, champion, folder)
    if reason := _obstacle(trial, read_json(join(folder, "config.json"))["config"]):
        return Decision(CHALLENGER, f"the champion, version {champion.version}, can't be measured: {reason}"), {}
    old, new = _champion_values(trial, job, resources, folder), trial.new_values()
    remove(folder)
    both = [name for name in old if np.isfinite(old[name]) and np.isfinite(new[name])]
    if not both:
        return Decision(CHALLENGER, f"no image of {trial.split} has a value of {gate.metric} from both models"), {}
    means = {"new": float(np.mean([new[n] for n in both])), "champion": float(np.mean([old[n] for n in both]))}
    larger = larger_is_better(trial.scores)[gate.metric]
    decision = decide(gate, means["new"], means["champion"], larger_is_better=larger)
    told = f"{decision.reason} (version {champion.version}; {len(both)} images of {trial.split})"
    return Decision(decision.alias, told), means


def _obstacle(trial: _Trial, champion: Mapping[str, Any]) -> str:
    """Why a tokenizer with the config ``champion`` can't take these images; empty when it can."""
    size = trial.images.manifest.config["data"]["image_size"]
    if tuple(champion["image_size"]) != (size, size):
        return f"it sees {champion['image_size'][0]} px, these images have {size}"
    if trial.gate.budget not in champion["budgets"]:
        return f"its budgets are {champion['budgets']}, without {trial.gate.budget}"
    return ""


def _champion_values(trial: _Trial, job: Job, resources: InferenceResources, tokenizer: str) -> dict[str, float]:
    """Image -> the champion's value, measured as the new model's was."""
    metric, config = trial.gate.metric, ScoreStageConfig.model_validate(trial.scores.manifest.config)
    judges = {name: judge.uri for name, judge in trial.judges.items()}
    order = Order(config, (metric,), tokenizer, judges)
    target = join(job.output, "champion_scores")
    mapping = TableMapping(
        sources=[trial.images.table_uri],
        target=target,
        build=partial(ChampionScorer, order, trial.gate.budget, trial.split),
        resources=resources,
        columns=[None],
    )
    map_table(mapping, job.progress)
    rows = read_table(target).to_pydict()
    return dict(zip(rows["image_id"], rows["value"], strict=True))


class ChampionScorer:
    """Encodes, decodes and measures the rows of one split."""

    def __init__(self, order: Order, budget: int, split: str) -> None:
        self._measuring, self._budget, self._split = Measuring(order), budget, split

    def __call__(self, images: pa.Table) -> tuple[pa.Table, Totals]:
        """image_id and value, float32."""
        held_out = images.filter(pc.equal(images["split"], self._split))
        values = np.zeros(0, dtype=np.float32)
        if len(held_out):
            (measured,) = self._measuring.measure(held_out, self._restored(held_out)).values()
            values = measured[:, 0]
        return pa.table({"image_id": held_out["image_id"], "value": values}), {"rows": len(held_out)}

    def _restored(self, images: pa.Table) -> "Iterator[Tensor]":
        """float32 [B, 3, H, W] at the budget."""
        import torch

        tokenizer = self._measuring.tokenizer
        device = next(tokenizer.parameters()).device
        pixels = to_float(torch.from_numpy(stack(images["image"].to_pylist())).to(device))
        yield tokenizer.decode(tokenizer.encode(pixels, self._budget))
