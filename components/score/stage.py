"""The stage: which columns are new, measured by actors one file at a time; which stand in earlier tables, copied."""

from functools import partial

import pyarrow.parquet as pq

from components.artifacts import (
    CodeBook,
    Figures,
    ImageSet,
    Job,
    Judge,
    Tokenizer,
    filesystem,
    join,
    read_json,
    write_json,
)
from components.config import InferenceResources
from components.mapping import Mapping, map_table, part_names
from components.score.pieces import Column, direction, find_earlier, wanted_columns
from components.score.summary import summarise
from components.score.worker import Plan, Scorer
from components.scores import METRICS
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
    earlier table of the workspace has. Figures are means over the held-out split and what was done: ``decoded_images``,
    ``decoded_tasks`` (by name, with spaces between them), ``copied_columns``.
    """
    by_task = {name.removeprefix(JUDGE): judge for name, judge in judges.items()}
    keys = {"images": images.key, "codes": codes.key, "tokenizer": tokenizer.key}
    columns = wanted_columns(config, keys, by_task)
    earlier = find_earlier(job.workspace, columns)
    copied = {ours for names in earlier.values() for ours in names.values()}
    plan = Plan(
        config=config,
        columns=tuple(columns),
        new=frozenset(column.name for column in columns) - copied,
        copied=tuple(earlier.values()),
        tokenizer=tokenizer.uri,
        judges={name: judge.uri for name, judge in by_task.items()},
    )
    mapping = Mapping(
        sources=[images.table_uri, codes.table_uri, *earlier],
        target=join(job.output, "table"),
        build=partial(Scorer, plan),
        resources=resources,
        columns=_read_columns(plan, images),
    )
    totals = map_table(mapping, job.progress)
    budgets = [int(budget) for budget in read_json(join(codes.uri, "budgets.json"))]
    write_json(join(job.output, "budgets.json"), budgets)
    decoded = sorted({column.task or column.name for column in columns if column.name in plan.new})
    figures: Figures = {
        "images": int(totals["rows"]),
        "decoded_images": int(totals["rows"]) * len(budgets) if plan.new else 0,
        "decoded_tasks": " ".join(decoded),
        "copied_columns": len(copied),
    }
    return figures | _summary(job, config, columns, budgets)


def _read_columns(plan: Plan, images: ImageSet) -> list[list[str] | None]:
    """What is needed of each source: no pixels and codes when all is copied, no target that nobody asks for."""
    wanted = ["image_id", "split"]
    if plan.new:
        wanted += ["image", *(name for name in _targets(plan) if name in _columns_of(images))]
    earlier = [["image_id", *names] for names in plan.copied]
    return [wanted, ["image_id", "codes"] if plan.new else ["image_id"], *earlier]


def _targets(plan: Plan) -> list[str]:
    """Columns of the ImageSet that the tasks with new columns compare with."""
    found = set()
    for task in plan.config.tasks:
        if any(f"{task.name}.{metric}" in plan.new for metric in task.metrics):
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
        }
        for column in columns
    }
    write_json(join(job.output, METRICS), about)
    write_json(join(job.output, "summary.json"), {"split": split, "rows": rows})
    means = {f"{row['column']}@{row['num_tokens']}": row["mean"] for row in rows if row["mean"] is not None}
    return {"split": split, **means}
