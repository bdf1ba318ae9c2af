"""What a person reads beside a registered tokenizer: what it is, how good, for what, how to load it. Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.artifacts import ImageSet, ScoreTable, TokenCounts, Tokenizer
from components.scores import budgets_of
from components.software import lineage_tags
from components.store import join, read_json
from model.config import AlitConfig

LIMITS = (  # one line: MLflow's page keeps line breaks
    "## Licence and limits\n\n"
    "The software is Apache-2.0; whether the weights may be passed on depends on the images that they were trained on. "
    "The numbers above hold for images like these: look at the report before using it on others. Tokens decode with "
    "the version that made them, and no other: archives carry its digest. Images are seen as their centre square."
)


def choice_of(registered: Sequence[str], budgets: Sequence[int]) -> str:
    """Parameters of a prediction, as Python: the first rule that went in with the weights, else the most tokens."""
    return f'{{"rule": "{registered[0]}"}}' if registered else f'{{"num_tokens": {budgets[-1]}}}'


@dataclass(frozen=True)
class Card:
    """What the card is about."""

    name: str
    images: ImageSet
    tokenizer: Tokenizer
    scores: ScoreTable
    counts: Mapping[str, TokenCounts]  # by task
    registered: Sequence[str]  # tasks whose rule went in with the weights

    def tags(self) -> dict[str, str]:
        """For searching: data, code, artifacts."""
        listing = str(self.images.manifest.fingerprint.get("listing", ""))
        keys = {"images": self.images.key, "tokenizer": self.tokenizer.key, "scores": self.scores.key}
        return {
            "alit.data_digest": listing,
            **{f"alit.key.{name}": key for name, key in keys.items()},
            **lineage_tags(),
        }

    def text(self) -> str:
        """The whole card."""
        return "\n\n".join([self._what(), self._quality(), self._rules(), LIMITS, self._use(), self._lineage()]) + "\n"

    def _what(self) -> str:
        config = AlitConfig.from_dict(read_json(join(self.tokenizer.uri, "config.json"))["config"])
        budgets, counts = budgets_of(self.scores), self.images.manifest.counts
        height, width = config.image_size
        codebook = config.codebook_size
        tokens = f"indices into {codebook} codes" if codebook else f"vectors of {config.channels_per_latent} numbers"
        return (
            f"# {self.name}\n\nAn adaptive-length image tokenizer (ALIT, arXiv 2411.02393): an image of "
            f"{width} x {height} px becomes {budgets[0]} to {budgets[-1]} tokens, as many as it needs. "
            f"Tokens are {tokens}. The run trained on {counts['train']:,} images; the {counts['val']:,} held-out ones "
            "took no part."
        )

    def _quality(self) -> str:
        rows = read_json(join(self.scores.uri, "summary.json"))["rows"]
        columns = list(dict.fromkeys(row["column"] for row in rows))
        at = {(row["num_tokens"], row["column"]): row["mean"] for row in rows}
        table = [[str(budget), *(_number(at.get((budget, c))) for c in columns)] for budget in budgets_of(self.scores)]
        split = "held-out" if self.scores.manifest.counts.get("split") == "val" else "training"
        return f"## Mean over the {split} images\n\n" + _table(["tokens", *columns], table)

    def _rules(self) -> str:
        rows = []
        for task, counts in self.counts.items():
            rule = read_json(join(counts.uri, "rules.json"))["rules"][0]
            saved = rule["saved_share"]
            by_name = "yes" if task in self.registered else "no: it needs more than the image"
            tokens, share = f"{rule['mean_tokens']:.1f}", "none is" if saved is None else f"{saved:.0%}"
            rows.append([task, rule["rule"], tokens, share, by_name])
        head = ["task", "rule", "mean tokens", "saved against a fixed length as good", "by its task's name"]
        return "## Rules\n\n" + _table(head, rows)

    def _use(self) -> str:
        budgets = budgets_of(self.scores)
        most = budgets[-1]
        return (
            "## How to load it\n\n```python\nimport mlflow, pandas as pd\n\n"
            f'model = mlflow.pyfunc.load_model("models:/{self.name}@champion")  # or /{self.name}/VERSION\n'
            'images = pd.DataFrame({"image": [open("photo.jpg", "rb").read()]})\n'
            f"tokens = model.predict(images, params={choice_of(self.registered, budgets)})\n"
            f'pictures = model.predict(images, params={{"num_tokens": {most}, "output": "images"}})  # base64 PNG\n```'
        )

    def _lineage(self) -> str:
        return "## Lineage\n\n" + _table(
            ["what", "which"], [[name, f"`{value}`"] for name, value in self.tags().items()]
        )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"
