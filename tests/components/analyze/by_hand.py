"""What the sections read, made without Ray."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from components.analyze.inputs import Inputs
from components.analyze.settings import AnalyzeConfig, Criterion
from components.artifacts import LengthModel, ScoreTable, TokenCounts
from components.config import NoConfig, RuleConfig
from components.select_counts import select
from components.store import write_table
from components.task_config import TaskConfig
from model import AlitTokenizer
from model.predicted import LengthHead
from model.recipes import LengthHeadConfig
from model.starter import STARTER
from tests.by_hand import Photographs, code_book, finish, image_set, job, of_photographs, tokenizer_artifact

THRESHOLD = RuleConfig(kind="threshold", metric="l1", max=0.08)
PREDICTED = RuleConfig(kind="predicted", metric="l1", max=0.08)


def inputs_of(
    folder: Path,
    made: Photographs,
    settings: AnalyzeConfig,
    rules: Sequence[RuleConfig] = (THRESHOLD,),
    *,
    precision: str = "fp32",
) -> Inputs:
    """Inputs over ``made`` for one task with these rules of l1; a predicted one has an untrained head."""
    of_photographs(folder / "scores", made)
    finish(folder / "scores", ScoreTable, config={"precision": precision})
    scores = ScoreTable.open(str(folder / "scores"))
    task = TaskConfig(name="reconstruction", rule=THRESHOLD)
    select(job(folder / "counts"), config=task, resources=NoConfig(), scores=scores)
    return Inputs(
        settings=settings,
        criteria=(Criterion(task="reconstruction", rules=tuple((rule, "l1") for rule in rules)),),
        images=image_set(folder / "images", made),
        tokenizer=tokenizer_artifact(),
        codes=code_book(folder / "codes", made),
        scores=scores,
        counts={"reconstruction": TokenCounts(uri=str(folder / "counts"), key="0")},
        lengths={"reconstruction": _length(folder / "length", made)},
    )


def _length(folder: Path, made: Photographs) -> LengthModel:
    width = AlitTokenizer.load(STARTER).config.encoder_width
    config = LengthHeadConfig(metric="l1", num_budgets=len(made.budgets), encoder_width=width, hidden=4)
    LengthHead(config).save(folder / "head")
    predicted = pa.array(list(made.scores["l1"]), pa.list_(pa.float32()))
    rows = pa.table({"image_id": [row["image_id"] for row in made.rows], "predicted": predicted})
    write_table(str(folder / "table"), rows)
    return LengthModel(uri=str(folder), key="0")
