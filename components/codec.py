"""encode and decode outside a pipeline: a folder of images to a token archive, and a token archive to PNG files."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from components.artifacts import REJECTED_SCHEMA, Figures, archive_header
from components.config import DataConfig, IngestConfig, RuleConfig
from components.image_files import BadImage
from components.images import encode_png, image_id, prepare, stack, to_float, to_uint8
from components.rules import rule_with_head
from components.sources import open_source
from components.store import join, local_folder, read_batches, read_json, write_json, write_table

if TYPE_CHECKING:
    from model import AlitTokenizer
    from model.predicted import PredictedThreshold
    from model.selection import Rule

BATCH = 32


@dataclass(frozen=True)
class EncodeRequest:
    """What to encode and where to."""

    model: str  # local folder of a tokenizer
    source: str  # as DataConfig's
    output: str
    rule: RuleConfig | int  # an int is a fixed number of tokens
    head: str = ""  # folder of the LengthHead of a rule that predicts


def encode_folder(request: EncodeRequest, progress: Callable[[str], None]) -> Figures:
    """Write a TokenArchive of every image in ``request.source``; raises ValueError for a bad folder or rule."""
    from model import AlitTokenizer
    from model.memory import keep_freed_memory

    keep_freed_memory()
    with local_folder(request.model) as folder:
        tokenizer = AlitTokenizer.load(folder)
    rule = request.rule if isinstance(request.rule, int) else rule_with_head(request.rule, Path(request.head))
    _check_fixed(tokenizer, rule)
    rejected: list[dict[str, str]] = []
    parts, tokens, done = [], 0, 0
    for names, pngs in _prepared(request.source, tokenizer.config.image_size[0], rejected):
        table = _encode(tokenizer, rule, names, pngs)
        parts.append(table)
        done, tokens = done + len(names), tokens + int(np.asarray(table["num_tokens"]).sum())
        progress(f"{done} images  {tokens / done:.1f} tokens a mean image")
    if not done:
        raise ValueError(f"--input {request.source!r}: none of its {len(rejected)} files is an image that can be read")
    write_table(join(request.output, "table"), pa.concat_tables(parts))
    write_table(join(request.output, "rejected"), pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA))
    write_json(join(request.output, "tokenizer.json"), archive_header(request.model))
    return {"images": done, "rejected": len(rejected), "tokens": tokens, "mean_tokens": tokens / done}


def _check_fixed(tokenizer: "AlitTokenizer", rule: "Rule | PredictedThreshold | int") -> None:
    if isinstance(rule, int) and rule not in tokenizer.budgets:
        raise ValueError(f"--tokens {rule}: allowed are the model's budgets, {list(tokenizer.budgets)}")


def _prepared(source: str, size: int, rejected: list[dict[str, str]]) -> Iterator[tuple[list[str], list[bytes]]]:
    """Image ids and PNGs at the working size, ``BATCH`` at a time; what can't be read goes to ``rejected``."""
    opened, limits = open_source(DataConfig(source=source, image_size=size)), IngestConfig()
    names, pngs = [], []
    for item in opened.list():
        try:
            data = opened.read(item.path, item.etag)
            prepared = prepare(data, size=size, max_pixels=limits.max_pixels)
        except (BadImage, FileNotFoundError, PermissionError) as error:
            rejected.append({"uri": opened.uri(item.path), "reason": str(error)})
            continue
        names.append(image_id(item.path, data))
        pngs.append(encode_png(prepared.image))
        if len(names) == BATCH:
            yield names, pngs
            names, pngs = [], []
    if names:
        yield names, pngs


def _encode(
    tokenizer: "AlitTokenizer", rule: "Rule | PredictedThreshold | int", names: list[str], pngs: list[bytes]
) -> pa.Table:
    import torch

    tokens = tokenizer.encode(to_float(torch.from_numpy(stack(pngs))), rule)
    columns = {"image_id": names, "num_tokens": pa.array(tokens.num_tokens, pa.int32()), "token_ids": tokens.to_arrow()}
    return pa.table(columns)


def decode_archive(model: str, archive: str, output: str, progress: Callable[[str], None]) -> Figures:
    """Write ``<image_id>.png`` for every row of a TokenArchive; raises ValueError when ``model`` did not make it."""
    import torch
    from PIL import Image

    from model import AlitTokenizer
    from model.memory import keep_freed_memory
    from model.tokens import TokenBatch

    keep_freed_memory()
    header = read_json(join(archive, "tokenizer.json"))
    with local_folder(model) as folder:
        digest = hashlib.sha256((Path(folder) / "weights.safetensors").read_bytes()).hexdigest()
        if digest != header["digest"]:
            made_by = f"{header['digest'][:12]} ({header['uri']})"
            raise ValueError(f"--model {model!r}: its weights are {digest[:12]}, the archive was made by {made_by}")
        tokenizer = AlitTokenizer.load(folder)
    Path(output).mkdir(parents=True, exist_ok=True)
    done = 0
    for batch in read_batches(join(archive, "table"), batch_rows=BATCH):
        tokens = TokenBatch.from_arrow(batch["token_ids"], header["codebook_size"], header["latent_dim"])
        with torch.inference_mode():
            pixels = to_uint8(tokenizer.decode(tokens))
        for name, image in zip(batch["image_id"].to_pylist(), pixels, strict=True):
            Image.fromarray(image).save(Path(output) / f"{Path(name).name}.png")
        done += len(pixels)
        progress(f"{done} images")
    return {"images": done}
