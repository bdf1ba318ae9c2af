"""pack.<task>: the chosen tokens of every image, gathered from the codes that tokenize kept. No encoder runs again."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import (
    CodeBook,
    Figures,
    Job,
    TokenCounts,
    Tokenizer,
    archive_header,
    filesystem,
    join,
    read_json,
    write_json,
)
from components.config import NoConfig
from components.mapping import part_names


def pack(
    job: Job, *, config: NoConfig, resources: NoConfig, codes: CodeBook, counts: TokenCounts, tokenizer: Tokenizer
) -> Figures:
    """Write a TokenArchive: image_id, num_tokens, token_ids (latents of a continuous tokenizer: flat float16)."""
    budgets = [int(budget) for budget in read_json(join(codes.uri, "budgets.json"))]
    header = archive_header(tokenizer.uri)
    store, target = filesystem(join(job.output, "table"))
    store.create_dir(target, recursive=True)
    images = tokens = 0
    for done, name in enumerate(part_names(codes.table_uri), start=1):
        table = _gather(_read(codes.table_uri, name), _read(counts.table_uri, name), budgets)
        pq.write_table(table, f"{target}/{name}", filesystem=store, compression="zstd")
        images += len(table)
        tokens += int(np.asarray(table["num_tokens"]).sum())
        job.progress(f"{images} images  {done} files")
    write_json(join(job.output, "tokenizer.json"), header)
    bits = tokens * header["bits_per_token"]
    return {"images": images, "tokens": tokens, "mean_bits": bits / images, "bytes": bits // 8}


def _read(uri: str, name: str) -> pa.Table:
    store, folder = filesystem(uri)
    return pq.read_table(f"{folder}/{name}", filesystem=store)


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
