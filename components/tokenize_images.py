"""tokenize: the codes of every image at every budget, by one run of the encoder (named so as not to shadow tokenize).

Legend: B batch, L latents of a budget, D numbers in a latent.
"""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from components.artifacts import Figures, ImageSet, Job, Tokenizer
from components.config import InferenceResources, PrecisionConfig
from components.images import stack, to_float
from components.mapping import Mapping, Totals, load_tokenizer, map_parts
from components.parts import earlier_by, plan_parts
from components.store import join, read_batches, read_json, write_json

MAKER = "tokenizer.json"  # the digest of the tokenizer that made the codes


def tokenize(
    job: Job, *, config: PrecisionConfig, resources: InferenceResources, images: ImageSet, tokenizer: Tokenizer
) -> Figures:
    """Codes at all budgets, flat, the smallest budget first; a continuous tokenizer's latents as float16.

    Those that an earlier CodeBook of the same tokenizer has are taken over. Figures are of all images, but for
    ``encoded``: images that went through the encoder in this run.
    """
    target, digest = join(job.output, "table"), tokenizer.digest()
    mapping = Mapping(
        sources=[images.table_uri],
        target=target,
        build=partial(_Encoder, tokenizer.uri, config),
        resources=resources,
        columns=[["image_id", "image"]],
    )
    earlier = earlier_by(job, config, maker=MAKER, digest=digest, column="codes")
    plan = plan_parts(images.table_uri, ["codes"], earlier)
    totals = map_parts(plan, lambda _: mapping, target=target, progress=job.progress)
    budgets = read_json(join(tokenizer.uri, "config.json"))["config"]["budgets"]
    write_json(join(job.output, "budgets.json"), budgets)
    write_json(join(job.output, MAKER), digest)
    first = next(read_batches(target, columns=["codes"], batch_rows=1))["codes"][0]
    return {"images": int(totals["rows"]), "tokens": int(totals["rows"]) * len(first), "encoded": int(totals["made"])}


class _Encoder:
    """Runs the encoder over batches of PNGs."""

    def __init__(self, tokenizer_uri: str, config: PrecisionConfig) -> None:
        self._tokenizer = load_tokenizer(tokenizer_uri, config.precision)
        self._device = next(self._tokenizer.parameters()).device

    def __call__(self, table: pa.Table) -> tuple[pa.Table, Totals]:
        codes = self._encode(stack(table["image"].to_pylist()))
        lists = pa.ListArray.from_arrays(np.arange(len(codes) + 1, dtype=np.int32) * codes.shape[1], codes.reshape(-1))
        return pa.table({"image_id": table["image_id"], "codes": lists}), {"rows": len(codes)}

    def _encode(self, images: np.ndarray) -> np.ndarray[Any, Any]:
        """uint8 [B, 3, H, W] to codes [B, sum of budgets], or latents float16 [B, sum of budgets * D]."""
        import torch

        from model.tokens import id_type

        size = self._tokenizer.config.codebook_size
        with torch.inference_mode():
            parts = []
            for step in self._tokenizer.rollout(to_float(torch.from_numpy(images).to(self._device))):
                if size is None or step.codes is None:
                    parts.append(step.latents.flatten(1).cpu().numpy().astype(np.float16))
                else:
                    parts.append(step.codes.cpu().numpy().astype(id_type(size)))
        return np.concatenate(parts, axis=1)
