"""score: how well each budget serves, per image: decodes every budget once and measures it.

Legend: N images, K budgets.
"""

from functools import partial

import numpy as np
import pyarrow as pa

from components.artifacts import CodeBook, Figures, ImageSet, Job, Tokenizer, join, read_json, write_json
from components.config import InferenceResources, ScoreStageConfig
from components.images import stack, to_float
from components.mapping import Mapping, Totals, load_tokenizer, map_table


def score(
    job: Job,
    *,
    config: ScoreStageConfig,
    resources: InferenceResources,
    images: ImageSet,
    codes: CodeBook,
    tokenizer: Tokenizer,
) -> Figures:
    """One float32 per budget and metric for every image; figures are means over the held-out split."""
    mapping = Mapping(
        sources=[images.table_uri, codes.table_uri],
        target=join(job.output, "table"),
        build=partial(_Scorer, tokenizer.uri, config.metrics),
        resources=resources,
        columns=[["image_id", "split", "image"], ["image_id", "codes"]],
    )
    totals = map_table(mapping, job.progress)
    budgets = read_json(join(codes.uri, "budgets.json"))
    write_json(join(job.output, "budgets.json"), budgets)
    held_out = "val" if totals.get("count/val") else "train"
    means = {
        f"{metric}@{budget}": totals[f"{metric}@{budget}/{held_out}"] / totals[f"count/{held_out}"]
        for metric in config.metrics
        for budget in budgets
    }
    return {"images": int(totals["rows"]), "split": held_out, **means}


class _Scorer:
    """Decodes codes and compares with the originals."""

    def __init__(self, tokenizer_uri: str, metrics: tuple[str, ...]) -> None:
        self._tokenizer = load_tokenizer(tokenizer_uri)
        self._metrics = metrics

    def __call__(self, images: pa.Table, codes: pa.Table) -> tuple[pa.Table, Totals]:
        if images["image_id"] != codes["image_id"]:
            raise AssertionError("images and codes are not the same rows in the same order")
        flat = codes["codes"].combine_chunks()
        values = self._measure(stack(images["image"].to_pylist()), flat.values.to_numpy().reshape(len(flat), -1))
        columns = {name: pa.array(list(scores), pa.list_(pa.float32())) for name, scores in values.items()}
        table = pa.table({"image_id": images["image_id"], "split": images["split"], **columns})
        return table, self._totals(np.asarray(images["split"]), values)

    def _measure(self, pixels: np.ndarray, codes: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric as float32 [N, K]."""
        import torch

        from model.metrics import METRICS
        from model.tokens import TokenBatch

        device = next(self._tokenizer.parameters()).device
        originals = to_float(torch.from_numpy(pixels).to(device))
        config = self._tokenizer.config
        per_token = 1 if config.codebook_size else config.channels_per_latent
        scores: dict[str, list[np.ndarray]] = {name: [] for name in self._metrics}
        start = 0
        with torch.inference_mode():
            for budget in self._tokenizer.budgets:
                part = codes[:, start : start + budget * per_token]
                tokens = part if config.codebook_size else part.reshape(len(part), budget, per_token)
                restored = self._tokenizer.decode(TokenBatch.from_numpy(list(tokens), config.codebook_size))
                for name, values in scores.items():
                    values.append(METRICS[name](originals, restored).cpu().numpy())
                start += budget * per_token
        return {name: np.stack(values, axis=1) for name, values in scores.items()}

    def _totals(self, split: np.ndarray, values: dict[str, np.ndarray]) -> Totals:
        totals: Totals = {"rows": len(split)}
        for name in np.unique(split):
            rows = split == name
            totals[f"count/{name}"] = int(rows.sum())
            for metric, scores in values.items():
                for budget, mean in zip(
                    self._tokenizer.budgets, scores[rows].sum(axis=0, dtype=np.float64), strict=True
                ):
                    totals[f"{metric}@{budget}/{name}"] = float(mean)
        return totals
