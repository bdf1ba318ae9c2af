"""publish: what a run found goes to MLflow: figures, tables, pictures, and the tokenizer as a registered model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from components.artifacts import (
    Analysis,
    Artifact,
    Figures,
    ImageSet,
    Job,
    Judge,
    LengthModel,
    ScoreTable,
    TokenCounts,
    Tokenizer,
)
from components.config import NoConfig, PublishConfig, RegisteredModel, RuleConfig, TablesConfig
from components.distributions import reference_of
from components.images import stack, to_float, to_uint8
from components.model_card import Card
from components.registry import Companions, ModelVersion, describe_version, register_judge, register_tokenizer
from components.rules import serves_alone
from components.scores import precision_of
from components.store import join, local_folder, read_batches, read_json, read_table, write_json
from components.tracking import Tracker

if TYPE_CHECKING:
    from model import AlitTokenizer

TABLE_ROWS = 1000  # of a per-image table in MLflow; the whole table stays in the workspace
GAP_PX = 4
WHITE, CHOSEN = 255, (220, 50, 47)


def publish(
    job: Job,
    *,
    config: PublishConfig,
    resources: NoConfig,
    images: ImageSet,
    tokenizer: Tokenizer,
    scores: ScoreTable,
    **by_task: Artifact,
) -> Figures:
    """Log tables and pictures to MLflow and register the tokenizer; ``by_task``: what was made after the scores."""
    _log(job, config, _Results(images, tokenizer, scores, by_task))
    tracker, counts, rules = Tracker(**job.tracking), _counts(by_task), _rules(_counts(by_task))
    heads = {
        name.removeprefix("length_"): join(artifact.uri, "head")
        for name, artifact in by_task.items()
        if isinstance(artifact, LengthModel)
    }
    companions = Companions(
        rules=rules,
        heads={task: heads[task] for task in rules if task in heads},
        judges=_register_judges(tracker, config, by_task),
        reference=reference_of(scores, counts),
    )
    version = _register(tracker, config, tokenizer, images, companions)
    card = Card(config.model_name, images, tokenizer, scores, counts, [*rules])
    describe_version(tracker, version, card=card.text(), tags=card.tags())
    write_json(join(job.output, "publication.json"), {"model": version.name, "version": version.version})
    return {"model": version.name, "version": version.version, "pictures": config.pictures}


def publish_tables(
    job: Job,
    *,
    config: TablesConfig,
    resources: RegisteredModel,
    images: ImageSet,
    tokenizer: Tokenizer,
    scores: ScoreTable,
    **by_task: Artifact,
) -> Figures:
    """Log tables and pictures to MLflow; the tokenizer is registered already, as ``resources`` says."""
    _log(job, config, _Results(images, tokenizer, scores, by_task))
    write_json(join(job.output, "publication.json"), {"model": resources.name, "version": resources.version})
    return {"model": resources.name, "version": resources.version, "pictures": config.pictures}


def _counts(by_task: Mapping[str, Artifact]) -> dict[str, TokenCounts]:
    """By task, in order."""
    return {one.manifest.config["name"]: one for one in by_task.values() if isinstance(one, TokenCounts)}


@dataclass(frozen=True)
class _Results:
    images: ImageSet
    tokenizer: Tokenizer
    scores: ScoreTable
    by_task: Mapping[str, Artifact]


def _log(job: Job, config: TablesConfig, results: _Results) -> None:
    """Figures to this run and the one above it, tables, analyses and pictures."""
    tracker, counts = Tracker(**job.tracking), _counts(results.by_task)
    analyses = {name: artifact for name, artifact in results.by_task.items() if isinstance(artifact, Analysis)}
    for target in (tracker, tracker.parent):
        target.metrics(_final_metrics(results.scores, {**counts, **analyses}))
    for task, chosen in counts.items():
        tracker.table(_rows(chosen), f"counts_{task}")
        tracker.table(_by_column(read_json(join(chosen.uri, "rules.json"))["rules"]), f"rules_{task}")
    for name, analysis in analyses.items():
        _log_analysis(tracker, name, analysis)
    tracker.table(_budget_table(results.scores), "budgets")
    first = next(iter(counts.values()))
    for row, picture in enumerate(_pictures(results, first, config.pictures)):
        tracker.picture(picture, f"reconstructions_{row:02d}")
        job.progress(f"picture {row + 1}/{config.pictures}")


def _register_judges(tracker: Tracker, config: PublishConfig, by_task: Mapping[str, Artifact]) -> dict[str, int]:
    """Task -> version of its judge."""
    versions = {}
    for name, artifact in by_task.items():
        if isinstance(artifact, Judge) and tracker.run_id:
            task = name.removeprefix("judge_")
            with local_folder(artifact.uri) as folder:
                named = f"{config.model_name}-judge-{task}"
                made = register_judge(tracker, folder, name=named, figures=artifact.manifest.counts)
            versions[task] = made.version
    return versions


def _final_metrics(scores: ScoreTable, found: Mapping[str, Artifact]) -> dict[str, float]:
    """Means over the held-out images, and the figures of each task's counts and of each analysis."""
    values = {f"held_out/{name}": v for name, v in scores.manifest.counts.items() if "@" in name}
    for name, artifact in found.items():
        values |= {
            f"{name}/{figure}": v for figure, v in artifact.manifest.counts.items() if isinstance(v, int | float)
        }
    return values


def _log_analysis(tracker: Tracker, name: str, analysis: Analysis) -> None:
    """An analysis as its table, and its JSON and pictures as files."""
    tracker.table(read_table(analysis.table_uri).to_pydict(), name)
    with local_folder(analysis.uri) as folder:
        files = {*Path(folder).glob(f"{name}.*"), *Path(folder).glob("*.png"), *Path(folder).glob("sections.json")}
        for file in sorted(files):
            tracker.artifact(file, "analyses")


def _budget_table(scores: ScoreTable) -> dict[str, list[Any]]:
    """One row a metric and budget: mean, median, 5th and 95th percentile, count, missing over the held-out images."""
    return _by_column(read_json(join(scores.uri, "summary.json"))["rows"])


def _by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns, None where a row lacks one."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _rows(counts: TokenCounts) -> dict[str, list[Any]]:
    """The first rows of a TokenCounts table."""
    batch = next(read_batches(counts.table_uri, batch_rows=TABLE_ROWS))
    return pa.Table.from_batches([batch]).to_pydict()


def _pictures(results: _Results, counts: TokenCounts, number: int) -> list[np.ndarray]:
    """uint8 [H, W, 3] strips: an original and its reconstruction at each budget, the chosen one framed.

    Images are held-out ones, spread over the counts that were chosen.
    """
    if not number:
        return []
    from model import AlitTokenizer

    chosen: dict[str, int] = {}
    for batch in read_batches(counts.table_uri, columns=["image_id", "num_tokens"]):
        chosen |= dict(zip(batch["image_id"].to_pylist(), batch["num_tokens"].to_pylist(), strict=True))
    pngs = _held_out(results.images, chosen, number)
    with local_folder(results.tokenizer.uri) as folder:
        model = AlitTokenizer.load(folder, precision=precision_of(results.scores))
    return [_strip(model, png, chosen[name]) for name, png in pngs.items()]


def _held_out(images: ImageSet, chosen: Mapping[str, int], number: int) -> dict[str, bytes]:
    """PNGs of ``number`` held-out images (any, where none is held out), from the fewest to the most tokens."""
    split: dict[str, str] = {}
    for batch in read_batches(images.table_uri, columns=["image_id", "split"]):
        split |= dict(zip(batch["image_id"].to_pylist(), batch["split"].to_pylist(), strict=True))
    names = [name for name, part in split.items() if part == "val"] or list(split)
    names.sort(key=lambda name: (chosen[name], name))
    wanted = {names[round(at)] for at in np.linspace(0, len(names) - 1, min(number, len(names)))}
    pngs: dict[str, bytes] = {}
    for batch in read_batches(images.table_uri, columns=["image_id", "image"], batch_rows=1024):
        pngs |= {row["image_id"]: row["image"] for row in batch.to_pylist() if row["image_id"] in wanted}
    return {name: pngs[name] for name in names if name in wanted}


def _strip(model: "AlitTokenizer", png: bytes, num_tokens: int) -> np.ndarray:
    import torch

    pixels = to_float(torch.from_numpy(stack([png])))
    with torch.inference_mode():
        steps = [(step.num_tokens, step.images) for step in model.rollout(pixels)]
    tiles = [_framed(pixels, chosen=False)] + [_framed(image, chosen=budget == num_tokens) for budget, image in steps]
    return np.concatenate(tiles, axis=1)


def _framed(image: Any, *, chosen: bool) -> np.ndarray:
    """float [1, 3, H, W] as uint8 [H, W, 3] with a margin that tells whether this budget was chosen."""
    (tile,) = to_uint8(image)
    height, width, _ = tile.shape
    framed = np.full((height + 2 * GAP_PX, width + 2 * GAP_PX, 3), CHOSEN if chosen else WHITE, dtype=np.uint8)
    framed[GAP_PX:-GAP_PX, GAP_PX:-GAP_PX] = tile
    return framed


def _rules(counts: Mapping[str, TokenCounts]) -> dict[str, Any]:
    """Task -> rule, of those that the tokenizer can apply by itself."""
    configs = {task: chosen.manifest.config["rule"] for task, chosen in counts.items()}
    return {task: rule for task, rule in configs.items() if serves_alone(RuleConfig.model_validate(rule))}


def _register(
    tracker: Tracker, config: PublishConfig, tokenizer: Tokenizer, images: ImageSet, companions: Companions
) -> ModelVersion:
    """The tokenizer as a new version of ``config.model_name``, with the tasks' rules beside the weights."""
    example = next(read_batches(images.table_uri, columns=["image"], batch_rows=1))["image"][0].as_py()
    with local_folder(tokenizer.uri) as folder:
        return register_tokenizer(tracker, folder, name=config.model_name, companions=companions, example_png=example)
