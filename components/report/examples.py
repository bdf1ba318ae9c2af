"""Originals beside their reconstructions at every budget: easy, median and hard ones, and what was rejected.

Legend: N rows, E examples, K budgets.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from components.artifacts import ImageSet
from components.image_files import BadImage, decode
from components.images import decode_png, to_uint8
from components.mapping import load_tokenizer
from components.report.read import Run, is_held_out, read_rows, whole_column
from components.scores import precision_of, values_of
from components.scores import whole_column as scores_column
from components.store import filesystem, read_batches, read_bytes

if TYPE_CHECKING:
    from model import AlitTokenizer

KINDS = {"easy": (0.0, 0.15), "median": (0.425, 0.575), "hard": (0.85, 1.0)}  # quantiles of the order by difficulty
LOSSLESS_PX = 128  # larger pictures are JPEG, so that the page stays small
LARGEST_PX = 256
QUALITY = 90
REJECTED_SHOWN = 12
REJECTED_BYTES, REJECTED_PIXELS = 20_000_000, 40_000_000  # larger files are named only


@dataclass(frozen=True)
class Tile:
    """One picture; ``num_tokens`` and ``value`` are None for the original."""

    src: str  # data URI
    num_tokens: int | None = None
    value: float | None = None
    chosen_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """An original and its reconstructions, the fewest tokens first."""

    kind: str
    uri: str
    chosen: Mapping[str, int]  # task -> tokens
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Rejected:
    """A file that did not become an image; ``src`` is a picture where the file has one."""

    uri: str
    reason: str
    src: str | None


def examples_of(run: Run, number: int, progress: Callable[[str], None]) -> list[Example]:
    """About ``number`` held-out images (any, where none is held out), a third of each kind."""
    if not number:
        return []
    kinds = _chosen_rows(run, number)
    rows = np.array(sorted(kinds))
    originals = read_rows(run.images.table_uri, rows, ["uri", "image"])
    codes = np.stack([row["codes"] for row in read_rows(run.codes.table_uri, rows, ["codes"])])
    counts = {task.name: whole_column(task.counts.table_uri, "num_tokens")[rows] for task in run.tasks}
    values = _values(run, rows)
    model = load_tokenizer(run.tokenizer.uri, precision_of(run.scores))
    restored = np.stack(list(_restored(model, codes, progress)))  # [K, E, H, W, 3]
    found = []
    for at, row in enumerate(rows.tolist()):
        chosen = {task: int(tokens[at]) for task, tokens in counts.items()}
        tiles = [Tile(_picture(decode_png(originals[at]["image"])))]
        for k, budget in enumerate(run.budgets):
            by = tuple(task for task, tokens in chosen.items() if tokens == budget)
            tiles.append(Tile(_picture(restored[k, at]), budget, values[at][k], by))
        found.append((list(KINDS).index(kinds[row][0]), kinds[row][1], originals[at]["uri"], chosen, tiles))
    found.sort(key=lambda example: example[:2])
    return [Example(list(KINDS)[kind], uri, chosen, tiles) for kind, _, uri, chosen, tiles in found]


def _chosen_rows(run: Run, number: int) -> dict[int, tuple[str, int]]:
    """Row -> its kind and its place among the examples, by the task that is shown: fewest tokens, then least error."""
    task = run.shown
    errors = scores_column(run.scores, task.column)[:, -1] * (-1 if run.larger_is_better[task.column] else 1)
    order = np.lexsort((errors, whole_column(task.counts.table_uri, "num_tokens")))
    order = order[is_held_out(run.scores)[order]]
    kinds: dict[int, tuple[str, int]] = {}
    for kind, (low, high) in KINDS.items():
        spread = np.linspace(low, high, max(1, round(number / len(KINDS)))) * (len(order) - 1)
        for place in spread.round().astype(np.int64).tolist():
            kinds.setdefault(int(order[place]), (kind, place))
    return kinds


def _values(run: Run, rows: np.ndarray) -> list[list[float | None]]:
    """What the rule of the shown task reads, at every budget; None where it is missing."""
    import pyarrow as pa

    name = run.shown.column
    lists = [row[name] for row in read_rows(run.scores.table_uri, rows, [name])]
    values = values_of(pa.table({name: pa.array(lists, pa.list_(pa.float32()))}), name, len(run.budgets))
    return [[float(one) if np.isfinite(one) else None for one in row] for row in values]


def _restored(model: "AlitTokenizer", codes: np.ndarray, progress: Callable[[str], None]) -> Iterator[np.ndarray]:
    """uint8 [E, H, W, 3] at each budget, from the codes of all budgets, flat [E, …]: no encoder runs."""
    import torch

    from model.tokens import TokenBatch

    config = model.config
    width = 1 if config.codebook_size else config.channels_per_latent
    start = 0
    for budget in model.budgets:
        part = codes[:, start : start + budget * width]
        start += budget * width
        tokens = part if config.codebook_size else part.reshape(len(part), budget, width).astype(np.float16)
        with torch.inference_mode():
            yield to_uint8(model.decode(TokenBatch.from_numpy(list(tokens), config.codebook_size)))
        progress(f"pictures at {budget} tokens")


def rejected_of(images: ImageSet) -> list[Rejected]:
    """The first rejected files."""
    found: list[Rejected] = []
    for batch in read_batches(images.rejected_uri):
        for row in batch.to_pylist():
            if len(found) == REJECTED_SHOWN:
                return found
            found.append(Rejected(row["uri"], row["reason"], _thumbnail(row["uri"])))
    return found


def _thumbnail(uri: str) -> str | None:
    """The file's picture, where it has one: an image may have been rejected for its depth map's sake."""
    try:
        store, path = filesystem(uri)
        if store.get_file_info(path).size is None or store.get_file_info(path).size > REJECTED_BYTES:
            return None
        image = decode(read_bytes(uri), max_pixels=REJECTED_PIXELS).image
    except (BadImage, OSError, ValueError):
        return None
    image.thumbnail((LOSSLESS_PX, LOSSLESS_PX))
    return _picture(np.asarray(image))


def _picture(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= LOSSLESS_PX:
        image.save(buffer, "PNG", optimize=True)
        return data_uri(buffer.getvalue(), "image/png")
    image.thumbnail((LARGEST_PX, LARGEST_PX))
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return data_uri(buffer.getvalue(), "image/jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """``data`` as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
