"""The stage: what no earlier table has is measured by actors, one file at a time; the rest is linked or copied."""

from functools import partial

import pyarrow.parquet as pq

from components.artifacts import CodeBook, Figures, ImageSet, Job, Judge, Tokenizer
from components.config import InferenceResources
from components.mapping import Mapping, map_parts
from components.parts import part_names, plan_parts
from components.score.pieces import Column, direction, earlier_tables, wanted_columns
from components.score.summary import summarise
from components.score.worker import KEYS, Order, Scorer
from components.scores import METRICS
from components.store import filesystem, join, read_json, write_json
from components.task_config import TASK_KINDS, ScoreStageConfig
from components.tasks.build import build_task

JUDGE = "judge_"  # inputs called judge_<task>


def score(
    job: Job,
    *,
    config: ScoreStageConfig,
    resources: InferenceResources,
    images: ImageSet,
    codes: CodeBook,
    tokenizer: Tokenizer,
    **judges: Judge,
) -> Figures:
    """One float32 per budget and metric for every image, null where it lacks the target.

    ``judges``: of each task that has one, as ``judge_<task>``. Each budget is decoded once for all columns that no
    earlier table of the workspace has for an image. Figures are means over the held-out split and what was done:
    ``scored`` (images that were measured), ``decoded_images`` (theirs, at every budget), ``decoded_tasks`` (by name,
    with spaces between them), ``copied_columns`` (those that were measured for no image).
    """
    by_task = {name.removeprefix(JUDGE): judge for name, judge in judges.items()}
    makers = {"tokenizer": tokenizer.digest(), "codes": codes.manifest.code, "precision": config.precision}
    columns = wanted_columns(config, makers, by_task)
    names = [column.name for column in columns]
    plan = plan_parts(images.table_uri, names, earlier_tables(job, columns), keys=KEYS)
    target = join(job.output, "table")

    def mapping_of(new: frozenset[str]) -> Mapping:
        wanted = tuple(name for name in names if name in new)
        order = Order(config, wanted, tokenizer.uri, {name: judge.uri for name, judge in by_task.items()})
        read = ["image", *(name for name in _targets(config, new) if name in _columns_of(images))]
        return Mapping(
            sources=[images.table_uri, codes.table_uri],
            target=target,
            build=partial(Scorer, order),
            resources=resources,
            columns=[[*KEYS, *read], ["image_id", "codes"]],
        )

    totals = map_parts(plan, mapping_of, target=target, progress=job.progress)
    budgets = [int(budget) for budget in read_json(join(codes.uri, "budgets.json"))]
    write_json(join(job.output, "budgets.json"), budgets)
    decoded = sorted({column.task or column.name for column in columns if column.name in plan.new})
    figures: Figures = {
        "images": int(totals["rows"]),
        "scored": int(totals["made"]),
        "decoded_images": int(totals["made"]) * len(budgets),
        "decoded_tasks": " ".join(decoded),
        "copied_columns": len(set(names) - plan.new),
    }
    return figures | _summary(job, config, columns, budgets)


def _targets(config: ScoreStageConfig, new: frozenset[str]) -> list[str]:
    """Columns of the ImageSet that the tasks with new columns compare with."""
    found = set()
    for task in config.tasks:
        if any(f"{task.name}.{metric}" in new for metric in task.metrics):
            target = TASK_KINDS[task.kind].target if task.kind in TASK_KINDS else build_task(task.kind, None).target
            found |= {target} if target else set()
    return sorted(found)


def _columns_of(images: ImageSet) -> list[str]:
    store, folder = filesystem(images.table_uri)
    with store.open_input_file(f"{folder}/{part_names(images.table_uri)[0]}") as stream:
        return list(pq.read_schema(stream).names)


def _summary(job: Job, config: ScoreStageConfig, columns: list[Column], budgets: list[int]) -> Figures:
    """Write ``metrics.json`` and ``summary.json``; returns the means."""
    split, rows, missing = summarise(join(job.output, "table"), [column.name for column in columns], budgets)
    own = {task.name: build_task(task.kind, None).metrics for task in config.tasks if task.kind not in TASK_KINDS}
    about = {
        column.name: {
            "task": column.task,
            "metric": column.metric,
            "direction": own[column.task][column.metric] if column.task in own else direction(column.metric),
            "missing": missing[column.name],
            "piece": column.piece,
            "place": place,
        }
        for place, column in enumerate(columns)
    }
    write_json(join(job.output, METRICS), about)
    write_json(join(job.output, "summary.json"), {"split": split, "rows": rows})
    means = {f"{row['column']}@{row['num_tokens']}": row["mean"] for row in rows if row["mean"] is not None}
    return {"split": split, **means}
