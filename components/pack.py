"""pack.<task>: the chosen tokens of every image, gathered from the codes that tokenize kept. No encoder runs again.

Legend: G groups of token positions, K codebook entries.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from components.artifacts import (
    CodeBook,
    Figures,
    ImageSet,
    Job,
    ScoreTable,
    TokenCounts,
    Tokenizer,
    archive_header,
)
from components.config import NoConfig, PackConfig
from components.images import decode_png
from components.parts import part_names
from components.scores import budgets_of, larger_is_better, values_of
from components.store import filesystem, join, read_batches, write_json

HOW = (
    "Mean bits an image. packed: ceil(log2(codebook)) a token, the count not included (it takes count_bits more). "
    "fixed: the most tokens. entropy: what an ideal coder needs that knows each token's distribution by the rollout "
    "that added it; distributions are counted in the train split and applied to the held-out images, whose packed bits "
    "stand beside it. png, jpeg: whole files, of a sample of held-out images; jpeg_matched: at the quality whose mean "
    "L1 over the sample is nearest to that of the chosen counts."
)
QUALITY, BEST_QUALITY = 75, 95


def pack(
    job: Job,
    *,
    config: PackConfig,
    resources: NoConfig,
    images: ImageSet,
    codes: CodeBook,
    scores: ScoreTable,
    counts: TokenCounts,
    tokenizer: Tokenizer,
) -> Figures:
    """Write a TokenArchive: image_id, num_tokens, token_ids (latents of a continuous tokenizer: flat float16).

    ``sizes.json`` compares bits an image with files and fixed length.
    """
    budgets, header = budgets_of(scores), archive_header(tokenizer.uri)
    store, target = filesystem(join(job.output, "table"))
    store.create_dir(target, recursive=True)
    distribution = _Distribution(budgets, header["codebook_size"])
    done = tokens = 0
    for number, name in enumerate(part_names(codes.table_uri), start=1):
        table = _gather(_read(codes.table_uri, name), _read(counts.table_uri, name), budgets)
        pq.write_table(table, f"{target}/{name}", filesystem=store, compression="zstd")
        distribution.add(table, np.asarray(pc.equal(_read(scores.table_uri, name, ["split"])["split"], "val")))
        done += len(table)
        tokens += int(np.asarray(table["num_tokens"]).sum())
        job.progress(f"{done} images  {number} files")
    write_json(join(job.output, "tokenizer.json"), header)
    bits = tokens * header["bits_per_token"]
    sizes = {"packed": bits / done, "fixed": budgets[-1] * header["bits_per_token"]} | distribution.bits()
    sizes |= _files(list(_sample(images, scores, counts, config.sizes_images)))
    write_json(join(job.output, "sizes.json"), sizes | {"count_bits": ceil(log2(len(budgets))), "how": HOW})
    figures = {f"mean_{name}_bits": value for name, value in sizes.items() if name not in ("packed", "jpeg_matched_at")}
    return {"images": done, "tokens": tokens, "mean_bits": bits / done, "bytes": bits // 8, **figures}


def _read(uri: str, name: str, columns: list[str] | None = None) -> pa.Table:
    store, folder = filesystem(uri)
    return pq.read_table(f"{folder}/{name}", filesystem=store, columns=columns)


def _gather(codes: pa.Table, counts: pa.Table, budgets: Sequence[int]) -> pa.Table:
    """Each image's codes at its own budget."""
    if codes["image_id"] != counts["image_id"]:
        raise AssertionError("codes and counts are not the same rows in the same order")
    flat = codes["codes"].combine_chunks()
    rows = flat.values.to_numpy().reshape(len(flat), -1)
    per_token = rows.shape[1] // sum(budgets)
    starts = dict(zip(budgets, np.cumsum([0, *budgets[:-1]]) * per_token, strict=True))
    num_tokens = np.asarray(counts["num_tokens"])
    chosen = [row[starts[n] : starts[n] + n * per_token] for row, n in zip(rows, num_tokens.tolist(), strict=True)]
    offsets = np.concatenate([[0], np.cumsum(num_tokens * per_token)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.concatenate(chosen) if chosen else rows.reshape(-1))
    return pa.table({"image_id": codes["image_id"], "num_tokens": counts["num_tokens"], "token_ids": ids})


class _Distribution:
    """How often each code is used, by the rollout that added its token, in the train and in the val split."""

    def __init__(self, budgets: Sequence[int], codebook_size: int | None) -> None:
        self._size = codebook_size
        self._ends = np.asarray(budgets)
        shape = (2, len(budgets), codebook_size or 0)
        self._counts = np.zeros(shape, dtype=np.int64)  # [split, G, K]
        self._held_out = 0

    def add(self, packed: pa.Table, held_out: np.ndarray) -> None:
        """Count the tokens of a file."""
        self._held_out += int(held_out.sum())
        if self._size is None:
            return
        num_tokens = np.asarray(packed["num_tokens"]).astype(np.int64)
        ids = packed["token_ids"].combine_chunks().flatten().to_numpy().astype(np.int64)
        place = np.arange(len(ids)) - np.repeat(np.cumsum(num_tokens) - num_tokens, num_tokens)
        group = np.searchsorted(self._ends, place, side="right")
        split = np.repeat(held_out.astype(np.int64), num_tokens)
        flat = (split * len(self._ends) + group) * self._size + ids
        self._counts += np.bincount(flat, minlength=self._counts.size).reshape(self._counts.shape)

    def bits(self) -> dict[str, float]:
        """Cross-entropy of the held-out tokens, bits an image; nothing where a split is empty or codes are none.

        Every code is counted once more than it was seen, so that none is impossible.
        """
        train, held_out = self._counts
        if self._size is None or not train.any() or not self._held_out:
            return {}
        share = (train + 1) / (train.sum(axis=1, keepdims=True) + self._size)
        packed = int(held_out.sum()) * ceil(log2(self._size))
        entropy = float(-(held_out * np.log2(share)).sum())
        return {"entropy": entropy / self._held_out, "packed_held_out": packed / self._held_out}


@dataclass(frozen=True)
class _Sampled:
    """An image, uint8 [H, W, 3], and the L1 of its chosen count (NaN where it wasn't scored)."""

    pixels: np.ndarray
    l1: float


def _sample(images: ImageSet, scores: ScoreTable, counts: TokenCounts, number: int) -> Iterator[_Sampled]:
    """``number`` held-out images (any, where none is held out): the first by id, which no order of the rows changes."""
    rows = pa.Table.from_batches(list(read_batches(scores.table_uri, columns=["image_id", "split"])))
    rows = rows.append_column("row", pa.array(np.arange(len(rows))))
    held_out = rows.filter(pc.equal(rows["split"], "val"))
    wanted = np.sort(np.asarray((held_out if len(held_out) else rows).sort_by("image_id").slice(0, number)["row"]))
    budgets, scored, start = budgets_of(scores), "l1" in larger_is_better(scores), 0
    for name in part_names(scores.table_uri):
        chosen = _read(counts.table_uri, name, ["num_tokens"])
        rows = wanted[(wanted >= start) & (wanted < start + len(chosen))] - start
        start += len(chosen)
        if not len(rows):
            continue
        pngs = _read(images.table_uri, name, ["image"])["image"]
        column = np.searchsorted(budgets, np.asarray(chosen["num_tokens"]))
        l1 = values_of(_read(scores.table_uri, name, ["l1"]), "l1", len(budgets)) if scored else None
        for row in rows:
            yield _Sampled(decode_png(pngs[row].as_py()), float("nan") if l1 is None else float(l1[row, column[row]]))


def _files(sample: Sequence[_Sampled]) -> dict[str, Any]:
    """Mean bits of the sample as PNG and as JPEG."""
    if not sample:
        return {}
    png = np.mean([8 * len(_encoded(image.pixels, format="PNG", optimize=True)) for image in sample])
    sizes = {"png": float(png), "jpeg75": _jpeg(sample, QUALITY)[0]}
    target = float(np.mean([image.l1 for image in sample]))
    if np.isfinite(target):
        quality = _matching_quality(sample, target)
        sizes |= {"jpeg_matched": _jpeg(sample, quality)[0], "jpeg_matched_at": quality}
    return sizes


def _matching_quality(sample: Sequence[_Sampled], target: float) -> int:
    """The JPEG quality whose mean L1 is nearest to ``target``, by bisection: more quality, less error."""
    low, high = 1, BEST_QUALITY
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _jpeg(sample, middle)[1] <= target else (middle, high)
    return min((low, high), key=lambda quality: abs(_jpeg(sample, quality)[1] - target))


def _jpeg(sample: Sequence[_Sampled], quality: int) -> tuple[float, float]:
    """Mean bits and mean L1 of the sample as JPEG."""
    bits, errors = [], []
    for image in sample:
        data = _encoded(image.pixels, format="JPEG", quality=quality, optimize=True)
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as restored:
            errors.append(np.abs(np.asarray(restored, dtype=np.float32) - image.pixels).mean() / 255)
        bits.append(8 * len(data))
    return float(np.mean(bits)), float(np.mean(errors))


def _encoded(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()
