"""Depth maps and masks: they lie where their image's pixels lie, or the row is rejected for a fair reason."""

import io
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from broken import png_of_size, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from real_targets import write_manifest
from test_manifest import write

from components.artifacts import IMAGES_SCHEMA, REJECTED_SCHEMA, Job
from components.codec import EncodeRequest, encode_folder
from components.config import DataConfig, IngestConfig, IngestResources, IngestStageConfig
from components.images import decode_png, encode_png, prepare
from components.ingest import Work, decode_block, ingest, write_blocks
from components.sources import open_source
from components.store import read_batches
from components.targets import decode_targets, depth_to_metres, mask_ids, prepare_target
from components.train.data import Decode
from model.starter import STARTER

MAX_PIXELS = 1_000_000
DATA = os.environ.get("ALIT_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="ALIT_TEST_DATA names no folder of CIFAR-10, CamVid and RGB-D")


def positions(width: int, height: int) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Image, depth and mask that all say where their pixels are: by colour, by number, by 16 x 16 block."""
    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), np.zeros_like(x)], axis=-1)
    blocks = (y * 16 // height) * 16 + x * 16 // width
    image = Image.fromarray(np.rint(colours).astype(np.uint8))
    return image, Image.fromarray((y * width + x + 1).astype(np.uint16)), Image.fromarray(blocks.astype(np.uint8))


def oriented(image: Image.Image, orientation: int | None, form: str = "PNG") -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    return saved(image, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))


def ingested(folder: Path, rows: list[dict], *, size: int = 48, limits: IngestConfig | None = None):
    """The rows of the table, and the reasons of the rejected by file name, of one block."""
    source = str(write(folder / "list.csv", rows))
    config = IngestStageConfig(data=DataConfig(source=source, image_size=size), limits=limits or IngestConfig())
    work = Work(open_source(config.data), config, str(folder / "out"))
    write_blocks(work.source.list(), f"{folder}/out/blocks", files_per_block=1000)
    tally = decode_block(0, work)
    images = stored(f"{folder}/out/table", IMAGES_SCHEMA) if tally.images else []
    rejected = stored(f"{folder}/out/rejected", REJECTED_SCHEMA) if tally.rejected else []
    return tally, images, {Path(row["uri"]).name: row["reason"] for row in rejected}


def stored(uri: str, schema: pa.Schema) -> list[dict]:
    return pa.Table.from_batches(list(read_batches(uri)), schema).to_pylist()


# --- geometry --------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(24, 90),
    height=st.integers(24, 90),
    size=st.integers(8, 120),
    orientation=st.integers(1, 8),
    form=st.sampled_from(["PNG", "TIFF", "WEBP"]),
)
def test_targets_land_where_the_image_does(width, height, size, orientation, form):
    image, depth, mask = positions(width, height)
    like = prepare(oriented(image, orientation, form), size=size, max_pixels=MAX_PIXELS)
    options = {"like": like, "size": size, "max_pixels": MAX_PIXELS}
    number = np.rint(depth_to_metres(prepare_target(saved(depth, "PNG"), "depth", **options)) * 1000).astype(int) - 1
    x, y = number % width, number // width
    block = mask_ids(prepare_target(saved(mask, "PNG"), "mask", **options)).astype(int)
    assert np.array_equal(block, (y * 16 // height) * 16 + x * 16 // width)
    colours = np.asarray(like.image).astype(float)
    inner = slice(2, -2)  # at the borders bicubic sees no further pixels and leans inwards
    for found, colour, side in ((x, colours[..., 0], width), (y, colours[..., 1], height)):
        off = np.abs(found - colour * (side - 1) / 255)[inner, inner]
        assert off.max() <= 1.1


def test_a_crop_without_resize_is_exact():
    for width, height in ((64, 48), (48, 64), (48, 48)):
        image, depth, _ = positions(width, height)
        like = prepare(saved(image, "PNG"), size=48, max_pixels=MAX_PIXELS)
        png = prepare_target(saved(depth, "PNG"), "depth", like=like, size=48, max_pixels=MAX_PIXELS)
        number = np.rint(depth_to_metres(png) * 1000).astype(int) - 1
        assert np.array_equal(np.asarray(image)[number // width, number % width], np.asarray(like.image))


@pytest.mark.parametrize("factor", [1, 2, 4, 5])
def test_a_target_of_another_resolution_lands_there_too(factor):
    width, height = 480, 360
    image, _, _ = positions(width, height)
    _, depth, _ = positions(round(width * factor / 8), round(height * factor / 8))
    like = prepare(saved(image, "PNG"), size=60, max_pixels=MAX_PIXELS)
    png = prepare_target(saved(depth, "PNG"), "depth", like=like, size=60, max_pixels=MAX_PIXELS)
    number = np.rint(depth_to_metres(png) * 1000).astype(int) - 1
    x = (number % depth.width + 0.5) * width / depth.width
    off = np.abs(x - np.asarray(like.image)[..., 0] / 255.0 * (width - 1))[2:-2, 2:-2]
    assert off.max() <= 0.5 * width / depth.width + 2  # half a pixel of the target's own


def test_a_target_that_states_its_own_orientation_is_turned_by_that():
    image, depth, mask = positions(60, 40)
    upright = prepare(saved(image, "PNG"), size=40, max_pixels=MAX_PIXELS)
    turned = depth.transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    options = {"like": upright, "size": 40, "max_pixels": MAX_PIXELS}
    expected = prepare_target(saved(depth, "PNG"), "depth", **options)
    assert prepare_target(oriented(turned, 6), "depth", **options) == expected
    on_its_side = prepare(oriented(image, 6), size=40, max_pixels=MAX_PIXELS)
    with_own = oriented(mask.transpose(Image.Transpose.ROTATE_270), 1)  # as a tool saves it that shows images upright
    assert prepare_target(with_own, "mask", like=on_its_side, size=40, max_pixels=MAX_PIXELS) == prepare_target(
        saved(mask, "PNG"), "mask", like=on_its_side, size=40, max_pixels=MAX_PIXELS
    )


@settings(max_examples=100, deadline=None)
@given(width=st.integers(20, 2000), height=st.integers(20, 2000), short=st.integers(8, 300), cut=st.booleans())
def test_sizes_as_a_resize_rounds_them_are_of_one_aspect(width, height, short, cut):
    scale = short / min(width, height)
    whole = int if cut else round
    size = (max(1, whole(width * scale)), max(1, whole(height * scale)))
    image = saved(Image.new("RGB", size), "PNG")
    mask = saved(Image.new("L", (width, height)), "PNG")
    like = prepare(image, size=8, max_pixels=10**7)
    assert mask_ids(prepare_target(mask, "mask", like=like, size=8, max_pixels=10**7)).shape == (8, 8)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_mask_says_its_indices(bits):
    ids = (np.arange(32 * 32) % 2**bits).astype(np.uint8).reshape(32, 32)
    image = Image.fromarray(ids, "P")
    image.putpalette([value for index in range(2**bits) for value in (255 - index, 7, index)])
    like = prepare(saved(Image.new("RGB", (32, 32)), "PNG"), size=32, max_pixels=MAX_PIXELS)
    png = prepare_target(saved(image, "PNG", bits=bits), "mask", like=like, size=32, max_pixels=MAX_PIXELS)
    assert np.array_equal(mask_ids(png), ids)


def test_stored_targets_are_exact_and_what_the_schema_says():
    millimetres = np.array([[0, 1, 1000], [65535, 500, 0], [2, 3, 4]], np.uint16)
    like = prepare(saved(Image.new("RGB", (3, 3)), "PNG"), size=3, max_pixels=MAX_PIXELS)
    options = {"like": like, "size": 3, "max_pixels": MAX_PIXELS}
    depth = prepare_target(saved(Image.fromarray(millimetres), "PNG"), "depth", **options)
    mask = prepare_target(saved(Image.fromarray(np.full((3, 3), 255, np.uint8)), "PNG"), "mask", **options)
    metres = depth_to_metres(depth)
    assert metres.dtype == np.float32 and np.isnan(metres[0, 0]) and np.isnan(metres[1, 2])
    assert metres[0, 1:].tolist() == [np.float32(0.001), 1.0] and metres[1, 0] == np.float32(65.535)
    assert mask_ids(mask).dtype == np.uint8 and (mask_ids(mask) == 255).all()
    assert [Image.open(io.BytesIO(png)).mode for png in (depth, mask)] == ["I;16", "L"]


def chelsea(tmp_path: Path) -> dict[str, np.ndarray]:
    """A real photograph below ``tmp_path``, 451 x 300 px, as a.png, and good targets for it."""
    photo = skimage.data.chelsea()
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(photo), "PNG"))
    brightness = photo.sum(axis=-1, dtype=np.uint16)
    return {"depth": brightness * 80, "mask": (brightness // 96).astype(np.uint8)}


def test_a_photographs_targets_reach_the_table(tmp_path):
    good = chelsea(tmp_path)
    for kind, values in good.items():
        (tmp_path / f"{kind}.png").write_bytes(saved(Image.fromarray(values), "PNG"))
    row = {"uri": "a.png", "label": "cat", "depth": "depth.png", "mask": "mask.png", "split": "test"}
    tally, (image,), _ = ingested(tmp_path, [row], size=300)
    assert (tally.depth, tally.mask, tally.val) == (1, 1, 1)
    assert (image["label"], image["split"], image["width"], image["height"]) == ("cat", "val", 451, 300)
    kept = np.rint(depth_to_metres(image["depth"]) * 1000).astype(int)
    assert np.array_equal(kept, good["depth"][:, 76:376])
    assert np.array_equal(mask_ids(image["mask"]), good["mask"][:, 76:376])
    brightness = decode_png(image["image"]).astype(int).sum(axis=-1)  # half a px to the left, resampled
    assert np.corrcoef(brightness.ravel(), kept.ravel())[0, 1] > 0.98


NAMED = re.escape("/t.png: ")
BAD = {
    "gone": ("depth", None, "cannot be read: No such file"),
    "empty": ("mask", b"", "empty file"),
    "8-bit depth": ("depth", ("L", (451, 300)), "8-bit grayscale PNG: a 16-bit grayscale PNG of millimetres is needed"),
    "16-bit mask": ("mask", ("I;16", (451, 300)), "16-bit grayscale PNG: an 8-bit grayscale or palette PNG"),
    "1-bit mask": ("mask", ("1", (451, 300)), "1-bit grayscale PNG: an 8-bit"),
    "colour mask": ("mask", ("RGB", (451, 300)), "8-bit RGB PNG: an 8-bit grayscale or palette PNG"),
    "lossy mask": ("mask", ("JPEG", (451, 300)), "JPEG: an 8-bit grayscale or palette PNG of class ids is needed"),
    "on its side": ("depth", ("I;16", (300, 451)), "300 x 451 px, its image is 451 x 300 px: one aspect is needed"),
    "a square": ("mask", ("L", (300, 300)), "300 x 300 px, its image is 451 x 300 px: one aspect is needed"),
    "a bomb": ("depth", png_of_size(50_000, 50_000), "too large: 50000 x 50000 px are more than 100000000"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_target_rejects_the_row_and_is_named(tmp_path, bad):
    chelsea(tmp_path)
    kind, content, said = BAD[bad]
    if isinstance(content, tuple):
        mode, size = content
        image = Image.new("L" if mode == "JPEG" else mode, size)
        content = saved(image, "JPEG" if mode == "JPEG" else "PNG")
    if content is not None:
        (tmp_path / "t.png").write_bytes(content)
    (tmp_path / "good.png").write_bytes((tmp_path / "a.png").read_bytes())
    tally, images, rejected = ingested(tmp_path, [{"uri": "a.png", kind: "t.png"}, {"uri": "good.png"}])
    assert (tally.images, tally.rejected) == (1, 1) and images[0]["uri"].endswith("good.png")
    assert re.search(f"^{kind} .*{NAMED}{said}", rejected["a.png"])


def test_damage_and_too_many_bytes_reject_the_row(tmp_path):
    good = chelsea(tmp_path)
    data = bytearray(saved(Image.fromarray(good["depth"]), "PNG"))
    (tmp_path / "t.png").write_bytes(data)
    row = {"uri": "a.png", "depth": "t.png"}
    small = IngestConfig(max_bytes=max(len(data), (tmp_path / "a.png").stat().st_size) - 1)
    _, _, rejected = ingested(tmp_path / "x", [{k: f"{tmp_path}/{v}" for k, v in row.items()}], limits=small)
    assert re.search(r"too many bytes: \d+ are more than \d+, in the largest of", rejected["a.png"])
    data[len(data) // 2] ^= 0x55
    (tmp_path / "t.png").write_bytes(data)
    _, _, rejected = ingested(tmp_path, [row])
    assert re.search("^depth .*t.png: cannot be decoded", rejected["a.png"])


# --- back to numbers -------------------------------------------------------------------------------------------------


def test_decode_targets_fills_what_is_missing():
    image, depth, mask = (encode_png(made) for made in positions(12, 12))
    rows = [{"label": "cat", "depth": depth}, {"mask": mask}, {"label": None}]
    row = dict.fromkeys(IMAGES_SCHEMA.names, "x") | {"width": 9, "height": 9, "image": image}
    nothing = {"label": None, "depth": None, "mask": None, "complexity": None}
    table = pa.Table.from_pylist([row | nothing | made for made in rows], IMAGES_SCHEMA)
    for part in (table, table.combine_chunks().to_batches()[0]):
        found = decode_targets(part, ["label", "depth", "mask"])
        assert found["label"].dtype == object and found["label"].tolist() == ["cat", None, None]
        assert (found["depth"].dtype, found["depth"].shape) == (np.float32, (3, 12, 12))
        assert np.array_equal(found["depth"][0], depth_to_metres(depth)) and np.isnan(found["depth"][1:]).all()
        assert (found["mask"].dtype, found["mask"].shape) == (np.int16, (3, 12, 12))
        assert np.array_equal(found["mask"][1], mask_ids(mask)) and (found["mask"][::2] == -1).all()
    assert decode_targets(table.slice(2), ["mask"])["mask"].shape == (1, 12, 12)  # told by the image
    assert decode_targets(table.slice(0, 0), ["depth"])["depth"].shape == (0, 0, 0)
    with pytest.raises(ValueError, match="column 'image' is needed"):
        decode_targets(table.slice(2).select(["mask"]), ["mask"])
    with pytest.raises(ValueError, match="columns = 'size': allowed are label, depth, mask"):
        decode_targets(table, ["size"])
    with pytest.raises(ValueError, match=r"columns = 'mask': the table has \['label'\]"):
        decode_targets(table.select(["label"]), ["mask"])


@pytest.mark.parametrize("targets", [(), ("label",), ("depth",), ("mask",), ("depth", "mask")])
def test_what_training_keeps_of_an_image_is_known_beforehand(targets):
    image, depth, mask = (encode_png(made) for made in positions(12, 12))
    row = dict.fromkeys(IMAGES_SCHEMA.names, "x") | {"width": 9, "height": 9, "complexity": None}
    table = pa.Table.from_pylist(3 * [row | {"image": image, "depth": depth, "mask": mask}], IMAGES_SCHEMA)
    decode = Decode(targets, ("x",))
    kept = sum(values.nbytes for name, values in decode(table).items() if name not in ("image_id", "label"))
    assert kept == 3 * decode.image_bytes(12, grid_bytes=0) == 3 * decode.image_bytes(12, grid_bytes=7) - 21


# --- real sets -------------------------------------------------------------------------------------------------------


@needs_data
def test_real_sets_in_one_manifest(tmp_path):
    manifest = write_manifest(tmp_path / "in", Path(DATA), cifar=50, camvid=15, rgbd=30)
    rows = list(open_source(DataConfig(source=str(manifest))).list())
    assert len(rows) == 95 and Counter(row.targets.split for row in rows) == {"train": 40 + 11 + 27, "val": 10 + 4 + 3}
    tally, images, rejected = ingested(
        tmp_path, [{"uri": row.path, **{k: v or "" for k, v in vars(row.targets).items()}} for row in rows], size=128
    )
    assert not rejected and (tally.images, tally.depth, tally.mask, len(tally.labels)) == (95, 30, 15, 10)
    for row in images:
        assert ("cifar10" in row["uri"]) == (row["label"] is not None)
        assert ("/depth/" in row["uri"]) == (row["depth"] is not None)
        assert ("/segmentation/" in row["uri"]) == (row["mask"] is not None)
    found = decode_targets(pa.Table.from_pylist(images, IMAGES_SCHEMA), ["depth", "mask"])
    assert set(np.unique(found["mask"])) == {-1, *range(12)}
    readings = found["depth"][np.isfinite(found["depth"])]
    assert 0.1 < readings.min() and readings.max() < 20 and 0.5 < np.median(readings) < 5


@needs_data
@pytest.mark.parametrize("size", [128, 200, 256, 300])
def test_nearest_is_pillows(size):
    """On real masks and depth, whose files have their images' size, against Pillow's nearest of the same square."""
    for row in open_source(DataConfig(source=str(Path(DATA) / "segmentation/images"), limit=3)).list():
        file = Path(DATA) / "segmentation/masks" / Path(row.path).with_suffix(".png")
        mask = Image.open(file)
        like = prepare((Path(DATA) / "segmentation/images" / row.path).read_bytes(), size=size, max_pixels=MAX_PIXELS)
        ours = mask_ids(prepare_target(file.read_bytes(), "mask", like=like, size=size, max_pixels=MAX_PIXELS))
        left = (mask.width - mask.height) / 2
        box = (left, 0, left + mask.height, mask.height)
        pillows = np.asarray(mask.resize((size, size), Image.Resampling.NEAREST, box=box))
        assert (ours == pillows).mean() > 0.999, (ours == pillows).mean()


# --- through the stage and the command -------------------------------------------------------------------------------


def test_encode_reads_a_manifest_and_counts_what_is_gone(tmp_path):
    chelsea(tmp_path)
    manifest = write(tmp_path / "list.csv", [{"uri": "a.png"}, {"uri": "gone.png"}])
    request = EncodeRequest(str(STARTER), str(manifest), str(tmp_path / "out"), 8)
    figures = encode_folder(request, lambda _: None)
    assert (figures["images"], figures["rejected"], figures["tokens"]) == (1, 1, 8)
    (gone,) = stored(f"{tmp_path}/out/rejected", REJECTED_SCHEMA)
    assert gone["uri"] == f"{tmp_path}/gone.png" and "No such file" in gone["reason"]


@pytest.mark.slow
@needs_data
def test_the_stage_on_a_manifest_of_real_sets(tmp_path):
    import ray

    manifest = write_manifest(tmp_path / "in", Path(DATA), cifar=40, camvid=10, rgbd=10)
    config = IngestStageConfig(data=DataConfig(source=str(manifest), image_size=64))
    ray.init("local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    try:
        tables = []
        for tasks, files_per_block in ((1, 64), (2, 7)):
            output = str(tmp_path / f"out{tasks}")
            job = Job("ingest", "0" * 16, output, output, output)
            figures = ingest(
                job, config=config, resources=IngestResources(tasks=tasks, files_per_block=files_per_block)
            )
            assert (figures["images"], figures["depth"], figures["mask"], figures["labels"]) == (60, 10, 10, 10)
            tables.append(stored(f"{output}/table", IMAGES_SCHEMA))
        assert tables[0] == tables[1]
    finally:
        ray.shutdown()
