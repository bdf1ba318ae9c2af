"""A token archive as a PyTorch user reads it: every image once, whatever the number of workers."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from components.archive import TokenArchiveDataset
from components.artifacts import archive_header
from components.store import write_json
from model import SIZES, AlitTokenizer
from tests.components.test_pack import packed


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("archive"), sizes_images=0)[0]


FIVE_LINES = """
from torch.utils.data import DataLoader
from components.archive import TokenArchiveDataset
dataset = TokenArchiveDataset("path/to/archive", batch_size=64, seed=0)  # bucketed: equal lengths, no padding
for image_ids, tokens in DataLoader(dataset, batch_size=None, num_workers=2):
    assert tokens.shape == (len(image_ids), tokens.shape[1])  # int64 [B, L]
"""


def test_five_lines_read_an_archive(archive: Path) -> None:
    exec(FIVE_LINES.replace("path/to/archive", str(archive)), {})


def rows_of(batches) -> dict[str, list[int]]:
    found = [(name, ids.tolist()) for batch in batches for name, ids in zip(*batch, strict=True)]
    assert len(dict(found)) == len(found), "an image came twice"
    return dict(found)


def stored(archive: Path) -> dict[str, list[int]]:
    rows = pq.read_table(archive / "table").to_pydict()
    return dict(zip(rows["image_id"], rows["token_ids"], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [None, 1])
def test_every_image_comes_once_in_batches_of_one_length(archive: Path, workers: int, seed: int | None) -> None:
    dataset = TokenArchiveDataset(str(archive), batch_size=4, seed=seed)
    batches = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    assert rows_of(batches) == stored(archive)
    for names, tokens in batches:
        assert tokens.dtype == torch.int64 and tokens.shape[0] == len(names) <= 4
        assert tokens.shape[1] in dataset.budgets
    lengths = Counter(tokens.shape[1] for _, tokens in batches if len(tokens) < 4)
    assert max(lengths.values(), default=0) <= max(workers, 1)  # one rest a length and reader


def test_shuffling_has_a_seed_and_epochs(archive: Path) -> None:
    def order(seed: int | None, epoch: int = 0) -> list[str]:
        dataset = TokenArchiveDataset(str(archive), batch_size=4, seed=seed)
        dataset.set_epoch(epoch)
        return [name for batch in dataset for name in batch.image_ids]

    assert order(1) == order(1) != order(2)
    assert order(1, epoch=1) != order(1) and sorted(order(1, epoch=1)) == sorted(order(None))


def test_the_rest_can_be_dropped(archive: Path) -> None:
    batches = list(TokenArchiveDataset(str(archive), batch_size=4, drop_last=True))
    assert batches and all(len(batch.tokens) == 4 for batch in batches)


def test_ranks_share_the_rows(archive: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch.distributed as dist\n"
        "from components.archive import TokenArchiveDataset\n"
        "from torch.utils.data import DataLoader\n"
        "rank = int(sys.argv[1])\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=rank, world_size=2)\n"
        f"loader = DataLoader(TokenArchiveDataset('{archive}', batch_size=4), batch_size=None, num_workers=2)\n"
        "print(*[name for batch in loader for name in batch.image_ids], 'ray' in sys.modules)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [words.pop() for words in said] == ["False", "False"]  # no Ray is needed to read an archive
    assert sorted(said[0] + said[1]) == sorted(stored(archive))
    assert abs(len(said[0]) - len(said[1])) <= 2


def test_continuous_tokens_keep_their_width(tmp_path: Path) -> None:
    values = [np.arange(n * 3, dtype=np.float16) for n in (2, 4, 2)]
    table = pa.table({"image_id": ["a", "b", "c"], "num_tokens": [2, 4, 2], "token_ids": values})
    (tmp_path / "table").mkdir()
    pq.write_table(table, tmp_path / "table" / "part-0.parquet")
    write_json(str(tmp_path / "tokenizer.json"), {"budgets": [2, 4], "codebook_size": None, "latent_dim": 3})
    batches = list(TokenArchiveDataset(str(tmp_path), batch_size=2))
    assert [(batch.image_ids, tuple(batch.tokens.shape)) for batch in batches] == [
        (["a", "c"], (2, 2, 3)),
        (["b"], (1, 4, 3)),
    ]
    assert batches[1].tokens.flatten().tolist() == list(range(12)) and batches[0].tokens.dtype == torch.float32


def test_what_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size = 0"):
        TokenArchiveDataset(str(archive), batch_size=0)
    with pytest.raises(FileNotFoundError):
        TokenArchiveDataset(str(tmp_path), batch_size=1)


def test_vectors_of_the_encoder_s_own_width(tmp_path: Path) -> None:
    """Continuous latents that are not projected."""
    config = replace(SIZES["demo"], codebook_size=None, latent_dim=None)
    AlitTokenizer(config).save(tmp_path / "tokenizer")
    header = archive_header(str(tmp_path / "tokenizer"))
    assert (header["latent_dim"], header["bits_per_token"]) == (config.encoder_width, 16 * config.encoder_width)
