"""Sources, and the ingest stage on real files in a real (small) Ray."""

import gc
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from broken import broken_files, picture, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.artifacts import IMAGES_SCHEMA, REJECTED_SCHEMA, Job
from components.config import DataConfig, IngestConfig, IngestResources, IngestStageConfig
from components.image_files import decode
from components.images import decode_png, image_id, prepare
from components.ingest import (
    BLOCKS_PER_LISTING,
    Work,
    choose_split,
    decode_block,
    ingest,
    read_block,
    write_blocks,
)
from components.ingest.decode import make_parts
from components.sources import ALLOWED, SourceObject, Targets, open_source
from components.sources.demo import MIN_SIDE, PHOTOGRAPHS
from components.store import read_batches

ROOT = Path(__file__).parents[2]
LIMITS = IngestConfig()
RESOURCES = IngestResources()


def folder_source(folder: Path, **options):
    return open_source(DataConfig(source=str(folder), **options))


def put(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(saved(picture(20, 16), "PNG"))


def paths_of(source) -> list[str]:
    return [item.path for item in source.list()]


def rows(uri: str, schema: pa.Schema) -> list[dict]:
    table = pa.Table.from_batches(list(read_batches(uri)), schema)
    return table.to_pylist()


# --- folder ----------------------------------------------------------------------------------------------------------


def test_folder_lists_images_sorted_by_path(tmp_path):
    put(
        tmp_path, "b/2.png", "b/10.PNG", "a.JPEG", "a/deep/er/1.webp", "a!/1.gif", "b.tif", "Z.jpg", "x.bmp", "ü/é.tiff"
    )
    put(tmp_path, ".hidden.png", ".git/1.png", "notes.txt", "manifest.csv", "no_suffix")
    (tmp_path / "folder.png").mkdir()
    found = paths_of(folder_source(tmp_path))
    assert found == sorted(found)
    assert set(found) == {
        "b/2.png", "b/10.PNG", "a.JPEG", "a/deep/er/1.webp", "a!/1.gif", "b.tif", "Z.jpg", "x.bmp", "ü/é.tiff"
    }  # fmt: skip
    assert paths_of(folder_source(tmp_path, limit=3)) == found[:3]


def test_folder_follows_no_link_that_leaves_it(tmp_path, caplog):
    inside, outside = tmp_path / "in", tmp_path / "out"
    put(inside, "real/1.png")
    put(outside, "2.png")
    (inside / "same.png").symlink_to(inside / "real/1.png")
    (inside / "away.png").symlink_to(outside / "2.png")
    (inside / "gone.png").symlink_to(inside / "nothing.png")
    (inside / "away").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    assert paths_of(folder_source(inside)) == ["real/1.png", "same.png"]
    assert "away.png" in caplog.text
    (tmp_path / "link_to_all").symlink_to(inside)
    assert paths_of(folder_source(tmp_path / "link_to_all")) == ["real/1.png", "same.png"]


def test_folder_digest_sees_every_change_that_matters(tmp_path):
    put(tmp_path, "a.png", "b/c.png")
    source = folder_source(tmp_path)
    first = source.digest()
    assert source.digest() == first
    put(tmp_path, "notes.txt")
    assert source.digest() == first
    seen = {first}
    for change in (
        lambda: os.utime(tmp_path / "a.png", ns=(1, 1)),
        lambda: (tmp_path / "a.png").rename(tmp_path / "a2.png"),
        (tmp_path / "b/c.png").unlink,
        lambda: put(tmp_path, "d.png"),
    ):
        change()
        seen.add(source.digest())
    assert len(seen) == 5
    assert folder_source(tmp_path, limit=1).digest() != source.digest()


@pytest.mark.parametrize(
    ("path", "label", "split"),
    [
        ("1.png", None, None),
        ("cat/1.png", "cat", None),
        ("animals/cat/1.png", "cat", None),
        ("train/cat/1.png", "cat", "train"),
        ("val/cat/1.png", "cat", "val"),
        ("test/cat/1.png", "cat", "val"),
        ("train/1.png", None, "train"),
        ("cat/train/1.png", None, None),
        ("train.png", None, None),
    ],
)
def test_folder_label_and_split(tmp_path, path, label, split):
    put(tmp_path, path)
    source = folder_source(tmp_path)
    (found,) = source.list()
    assert found.targets == Targets(label=label, split=split)
    assert source.uri(path) == f"{tmp_path}/{path}"
    assert source.read(path) == (tmp_path / path).read_bytes()


def test_source_errors_name_field_value_and_what_is_allowed(tmp_path):
    put(tmp_path, "full/notes.txt")
    for source, said in {
        f"{tmp_path}/missing": "there is no such folder",
        f"{tmp_path}/full/notes.txt": "it is not a folder",
        "http://host/images": "unknown kind of address",
    }.items():
        with pytest.raises(ValueError, match=f"data.source '{re.escape(source)}': {said}.*{ALLOWED}"):
            open_source(DataConfig(source=source))
    with pytest.raises(ValueError, match=r"data.source .*no image files.*\.jpg"):
        folder_source(tmp_path).digest()


def test_relative_source_becomes_absolute(tmp_path, monkeypatch):
    put(tmp_path, "images/1.png")
    monkeypatch.chdir(tmp_path)
    assert open_source(DataConfig(source="images")).place.root == f"{tmp_path}/images"


def test_listing_a_source_needs_no_heavy_import(tmp_path):
    put(tmp_path, "1.png")
    (tmp_path / "list.csv").write_text("uri\n1.png\n")
    code = (
        "import sys; from components.config import DataConfig; from components.sources import open_source\n"
        f"for source in ('demo', {str(tmp_path)!r}, '{tmp_path}/list.csv'):\n"
        "    open_source(DataConfig(source=source)).digest()\n"
        "heavy = {'torch', 'ray', 'mlflow', 'skimage', 'sklearn', 'numpy', 'PIL', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- demo ------------------------------------------------------------------------------------------------------------


def test_demo_crops():
    source = open_source(DataConfig(source="demo", crops=100))
    found = list(source.list())
    assert len(found) == 100 and found == list(source.list())
    assert [item.path for item in found] == sorted(item.path for item in found)
    each = Counter(item.targets.label for item in found)
    assert set(each) == {photograph.name for photograph in PHOTOGRAPHS}
    assert max(each.values()) - min(each.values()) <= 1
    assert len({item.etag + item.targets.label for item in found}) == 100


def test_demo_crops_are_real_square_and_of_several_scales():
    source = open_source(DataConfig(source="demo", crops=90))
    for photograph in PHOTOGRAPHS:
        short = min(photograph.width, photograph.height)
        crops = [decode(source.read(f"{photograph.name}/{i:04d}.png"), max_pixels=10**7).image for i in range(6)]
        assert all(crop.width == crop.height for crop in crops)
        sides = [crop.width for crop in crops]
        assert sides[0] == short and min(sides) >= max(MIN_SIDE, short // 4) and len(set(sides)) > 3
        assert np.asarray(crops[0]).std() > 10
    assert source.read("astronaut/0003.png") == source.read("astronaut/0003.png")


def test_demo_splits_by_photograph():
    source = open_source(DataConfig(source="demo", crops=90))
    splits = {item.targets.label: item.targets.split for item in source.list()}
    assert {name for name, split in splits.items() if split == "val"} == {"chelsea", "coins", "flower", "rocket"}
    assert set(splits.values()) == {"train", "val"}
    assert all(photograph.credit for photograph in PHOTOGRAPHS)


def test_demo_digest_and_growth():
    small, large = (open_source(DataConfig(source="demo", crops=crops)) for crops in (60, 90))
    assert small.digest() != large.digest()
    assert set(small.list()) <= set(large.list())
    assert open_source(DataConfig(source="demo", crops=60)).digest() == small.digest()
    assert len(paths_of(open_source(DataConfig(source="demo", limit=7)))) == 7


# --- listing and splits ----------------------------------------------------------------------------------------------


def objects(count: int):
    return (SourceObject(f"{index:07d}.png", index, str(index)) for index in range(count))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 400), per_block=st.integers(1, 9))
def test_listing_round_trip(tmp_path_factory, count, per_block):
    uri = str(tmp_path_factory.mktemp("listing"))
    num_files, num_blocks = write_blocks(objects(count), uri, files_per_block=per_block)
    assert (num_files, num_blocks) == (count, -(-count // per_block))
    blocks = [read_block(uri, block) for block in range(num_blocks)]
    assert [item for block in blocks for item in block] == list(objects(count))
    assert {len(block) for block in blocks[:-1]} <= {per_block}
    assert len(list(Path(uri).iterdir())) == -(-num_blocks // BLOCKS_PER_LISTING)


def test_listing_streams(tmp_path):
    def peak(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        write_blocks(objects(count), str(tmp_path / str(count)), files_per_block=64)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1_000)
    assert peak(40_000) < 2 * peak(8_000)


def test_split_by_hash_is_about_the_share_and_stable():
    paths = [f"{index}.jpg" for index in range(5000)]
    for share in (0.0, 0.1, 0.5):
        held_out = {path for path in paths if choose_split(path, share) == "val"}
        assert abs(len(held_out) / 5000 - share) < 0.02
        assert held_out <= {path for path in paths if choose_split(path, share + 0.1) == "val"}


# --- the stage -------------------------------------------------------------------------------------------------------


def config_of(source, *, size: int = 32, limits: IngestConfig = LIMITS, **options) -> IngestStageConfig:
    return IngestStageConfig(data=DataConfig(source=str(source), image_size=size, **options), limits=limits)


def write_big(folder: Path, count: int) -> None:
    """Files of 12 megapixels: 36 MB each once decoded."""
    folder.mkdir()
    data = saved(picture().resize((4000, 3000)), "WEBP", quality=30, method=0)
    for index in range(count):
        (folder / f"{index}.webp").write_bytes(data)


def test_decoding_a_block_holds_one_image_at_a_time(tmp_path):
    """Peak memory of a fresh process, in MB, for a block of 2 and of 12 images that are 36 MB each when decoded."""
    code = (
        "import resource, sys\n"
        "from components.config import DataConfig, IngestStageConfig\n"
        "from components.ingest import Work, decode_block, write_blocks\n"
        "from components.sources import open_source\n"
        "config = IngestStageConfig(data=DataConfig(source=sys.argv[1], image_size=64))\n"
        "work = Work(open_source(config.data), config, sys.argv[2])\n"
        "write_blocks(work.source.list(), sys.argv[2] + '/blocks', files_per_block=64)\n"
        "print(decode_block(0, work).images, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = {}
    for count in (2, 12):
        write_big(tmp_path / str(count), count)
        command = [sys.executable, "-c", code, str(tmp_path / str(count)), str(tmp_path / f"out{count}")]
        done, peaks[count] = map(int, subprocess.check_output(command, cwd=ROOT, text=True).split())
        assert done == count
    assert peaks[12] < peaks[2] + 80


def test_decoding_a_block_again_writes_the_same_files(tmp_path):
    put(tmp_path / "in", *(f"{index}.png" for index in range(5)))
    (tmp_path / "in/bad.png").write_bytes(b"")
    config = config_of(tmp_path / "in")
    work = Work(open_source(config.data), config, str(tmp_path / "out"))
    write_blocks(work.source.list(), f"{tmp_path}/out/blocks", files_per_block=3)
    tallies = [decode_block(block, work) for block in (0, 1)]
    first = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.parquet")}
    assert [decode_block(block, work) for block in (1, 0)] == tallies[::-1]
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.parquet")} == first


def test_what_was_listed_is_told_though_the_source_has_changed_since_the_plan(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    put(folder, "a.png", "b.png")
    planned = folder_source(folder).digest()

    def one_after_the_other(work: Work, num_blocks: int, *_: object):
        yield from (decode_block(block, work) for block in range(num_blocks))

    monkeypatch.setattr("components.ingest.stage.make_parts", one_after_the_other)
    same, _ = run_ingest(tmp_path / "same", config_of(folder))
    put(folder, "b2.png")
    other, _ = run_ingest(tmp_path / "other", config_of(folder))
    assert same["seen.listing"] == planned != other["seen.listing"] == folder_source(folder).digest()
    assert (same["images"], other["images"]) == (2, 3)


def test_files_that_cannot_be_read_are_rejected(tmp_path):
    put(tmp_path / "in", "big.png", "gone.png", "good.png")
    (tmp_path / "in/big.png").write_bytes(saved(picture(300, 300), "BMP"))
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.png")).write_bytes(saved(picture(), "PNG"))
    config = config_of(tmp_path / "in", limits=IngestConfig(max_bytes=100_000))
    work = Work(open_source(config.data), config, str(tmp_path / "out"))
    write_blocks(work.source.list(), f"{tmp_path}/out/blocks", files_per_block=9)
    (tmp_path / "in/gone.png").unlink()
    tally = decode_block(0, work)
    assert (tally.images, tally.rejected) == (1, 3)
    reasons = {Path(row["uri"]).name: row["reason"] for row in rows(f"{tmp_path}/out/rejected", REJECTED_SCHEMA)}
    assert "too many bytes: 270054 are more than 100000" in reasons["big.png"]
    assert "No such file" in reasons["gone.png"]
    assert "not UTF-8" in reasons["caf\\udce9.png"]


def test_a_failing_disk_is_not_a_bad_image(tmp_path, monkeypatch):
    put(tmp_path / "in", "1.png")
    config = config_of(tmp_path / "in")
    work = Work(open_source(config.data), config, str(tmp_path / "out"))
    write_blocks(work.source.list(), f"{tmp_path}/out/blocks", files_per_block=9)

    def fail(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        decode_block(0, work)


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=200_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


def run_ingest(output: Path, config: IngestStageConfig, resources: IngestResources = RESOURCES):
    output.mkdir(parents=True)
    said: list[str] = []
    job = Job("ingest", "0" * 16, str(output), str(output), str(output), progress=said.append)
    return ingest(job, config=config, resources=resources), said


def write_thousand(folder: Path) -> dict[str, str]:
    """980 crops of photographs in many formats and 20 broken files; returns the reasons the broken ones deserve."""
    forms = [
        ("jpg", "JPEG", "RGB"), ("png", "PNG", "RGB"), ("webp", "WEBP", "RGB"), ("jpeg", "JPEG", "L"),
        ("gif", "GIF", "P"), ("tif", "TIFF", "CMYK"), ("bmp", "BMP", "RGB"), ("png", "PNG", "RGBA"),
        ("PNG", "PNG", "1"), ("jpg", "JPEG", "CMYK"),
    ]  # fmt: skip
    source = open_source(DataConfig(source="demo", crops=98))
    for place, item in enumerate(source.list()):
        crop = decode(source.read(item.path), max_pixels=10**7).image.resize((100, 80))
        for number, (suffix, form, mode) in enumerate(forms):
            file = folder / item.targets.label / f"{place}_{number}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(saved(crop.convert(mode), form))
    for broken in broken_files():
        (folder / "coffee" / broken.name).write_bytes(broken.data)
    return {str(folder / "coffee" / broken.name): broken.reason for broken in broken_files()}


@pytest.fixture(scope="module")
def thousand(cluster, tmp_path_factory):
    """The folder, the reasons, and the artifact made of it."""
    folder = tmp_path_factory.mktemp("thousand")
    reasons = write_thousand(folder / "in")
    figures, said = run_ingest(folder / "out", config_of(folder / "in"))
    return folder, reasons, figures, said


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_file_that_kills_its_process_fails_the_stage_after_three_more_tries(tmp_path):
    class Deadly:  # here, so that it travels by value
        def __init__(self, tries: str) -> None:
            self.tries = tries

        def uri(self, path: str) -> str:
            return path

        def read(self, path: str, etag: str = "") -> bytes:
            with open(self.tries, "a") as file:
                file.write("once more\n")
            os.kill(os.getpid(), signal.SIGKILL)
            return b""

    source = Deadly(str(tmp_path / "tries"))
    write_blocks(iter([SourceObject("a.png", 1, "")]), f"{tmp_path}/out/blocks", files_per_block=3)
    work = Work(source, config_of(tmp_path), str(tmp_path / "out"))
    with pytest.raises(Exception, match="WorkerCrashedError|died|crashed"):
        list(make_parts(work, 1, 1, RESOURCES))
    assert (tmp_path / "tries").read_text().splitlines() == ["once more"] * 4


@pytest.mark.slow
def test_a_thousand_images_of_which_twenty_are_broken(thousand):
    folder, reasons, figures, said = thousand
    assert (figures["images"], figures["rejected"], figures["labels"]) == (980, 20, 15)
    assert figures["train"] + figures["val"] == 980 and 60 < figures["val"] < 140
    rejected = {row["uri"]: row["reason"] for row in rows(f"{folder}/out/rejected", REJECTED_SCHEMA)}
    assert rejected.keys() == reasons.keys()
    for uri, reason in rejected.items():
        assert re.search(reasons[uri], reason), (uri, reason)
    assert said[0] == "1000 files listed" and said[-1] == "980 images, 20 rejected"


@pytest.mark.slow
def test_rows_of_the_thousand(thousand):
    folder, _, figures, _ = thousand
    images = rows(f"{folder}/out/table", IMAGES_SCHEMA)
    uris = [row["uri"] for row in images]
    assert uris == sorted(uris) and len(set(uris)) == len({row["image_id"] for row in images}) == 980
    assert figures["bytes"] == sum(len(row["image"]) for row in images)
    for row in images[::37]:
        path = str(Path(row["uri"]).relative_to(folder / "in"))
        data = Path(row["uri"]).read_bytes()
        expected = prepare(data, size=32, max_pixels=10**8)
        assert (row["image_id"], row["label"]) == (image_id(path, data), Path(row["uri"]).parent.name)
        assert (row["width"], row["height"], row["split"]) == (100, 80, choose_split(path, 0.1))
        assert np.array_equal(decode_png(row["image"]), np.asarray(expected.image))
    listed = pa.Table.from_batches(list(read_batches(f"{folder}/out/listing")))
    assert listed.num_rows == 1000


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "files_per_block"), [(1, 7), (2, 500), (2, 5000)])
def test_rows_do_not_depend_on_how_they_were_made(thousand, tasks, files_per_block):
    folder, _, figures, _ = thousand
    other = folder / f"out_{files_per_block}"
    again, _ = run_ingest(
        other, config_of(folder / "in"), IngestResources(tasks=tasks, files_per_block=files_per_block)
    )
    assert again == figures
    assert rows(f"{other}/table", IMAGES_SCHEMA) == rows(f"{folder}/out/table", IMAGES_SCHEMA)
    assert rows(f"{other}/rejected", REJECTED_SCHEMA) == rows(f"{folder}/out/rejected", REJECTED_SCHEMA)


@pytest.mark.slow
def test_too_many_bad_files_fail_the_stage(thousand):
    folder = thousand[0]
    config = config_of(folder / "in", limits=IngestConfig(max_rejected=19))
    with pytest.raises(
        ValueError, match=r"20 of the \d+ files read so far are bad, ingest.max_rejected allows 19: /.*;"
    ):
        run_ingest(folder / "out_limit", config)


@pytest.mark.slow
def test_no_good_image_fails_the_stage(cluster, tmp_path):
    put(tmp_path / "in", "1.png")
    (tmp_path / "in/1.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"data.source .*no good image in it: .*1\.png: not an image"):
        run_ingest(tmp_path / "out", config_of(tmp_path / "in"))


@pytest.mark.slow
def test_demo_source_end_to_end_with_one_cpu_free(cluster, tmp_path):
    @cluster.remote(num_cpus=1)
    class Occupant:
        def ready(self) -> bool:
            return True

    occupant = Occupant.remote()
    cluster.get(occupant.ready.remote())
    figures, _ = run_ingest(tmp_path / "out", config_of("demo", crops=45))
    cluster.kill(occupant)
    assert (figures["images"], figures["rejected"], figures["train"], figures["val"]) == (45, 0, 33, 12)
    images = rows(f"{tmp_path}/out/table", IMAGES_SCHEMA)
    assert {row["label"] for row in images if row["split"] == "val"} == {"chelsea", "coins", "flower", "rocket"}
    assert images[0]["uri"] == "demo://astronaut/0000.png" and images[0]["width"] == 512
    assert rows(f"{tmp_path}/out/rejected", REJECTED_SCHEMA) == []


@pytest.mark.slow
def test_folder_splits_reach_the_table(cluster, tmp_path):
    put(tmp_path / "in", "train/cat/1.png", "val/cat/2.png", "test/dog/3.png")
    figures, _ = run_ingest(tmp_path / "out", config_of(tmp_path / "in"))
    assert (figures["train"], figures["val"], figures["labels"]) == (1, 2, 2)
    images = rows(f"{tmp_path}/out/table", IMAGES_SCHEMA)
    assert [(row["label"], row["split"]) for row in images] == [("dog", "val"), ("cat", "train"), ("cat", "val")]


@pytest.mark.slow
@pytest.mark.skipif("ALIT_TEST_DATA" not in os.environ, reason="ALIT_TEST_DATA names no folder of photographs")
def test_real_photographs(cluster, tmp_path):
    photos = Path(os.environ["ALIT_TEST_DATA"]) / "photos"
    figures, _ = run_ingest(tmp_path / "out", config_of(photos, size=64, limit=200))
    assert (figures["images"], figures["rejected"]) == (200, 0)
    for row in rows(f"{tmp_path}/out/table", IMAGES_SCHEMA):
        assert Image.open(row["uri"]).size == (row["width"], row["height"])
