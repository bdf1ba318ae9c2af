"""Images inside tar shards and Parquet tables: on a local disk and in a bucket, the same."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken import picture, saved

from components.config import DataConfig, IngestConfig, IngestStageConfig
from components.ingest import Work, decode_block, write_blocks
from components.sources import Targets, open_source
from components.sources.folder import FolderSource
from components.sources.manifest import ManifestSource
from components.sources.places import ChangedFile, expand
from components.sources.table import TableSource
from components.sources.tar import TarSource, ahead
from tests.s3_server import Proxy, client_of, point, s3_server, upload

PNG, JPEG = saved(picture(20, 16), "PNG"), saved(picture(20, 16), "JPEG")
DEPTH = saved(picture(20, 16).convert("I;16"), "PNG")
MASK = saved(picture(20, 16).convert("L"), "PNG")
LONG = "photographs of a long road/" * 6  # a name that needs a pax header

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def server():
    with s3_server() as endpoint:
        client_of(endpoint).create_bucket(Bucket="data")
        yield endpoint


@pytest.fixture(params=["local", "bucket"])
def place(request, server, monkeypatch, tmp_path):
    """A folder to fill, and a function that gives its address after that."""
    folder = tmp_path / "data"
    folder.mkdir()
    if request.param == "local":
        return folder, lambda: str(folder)
    point(monkeypatch, server)

    def address() -> str:
        upload(client_of(server), folder, "data", f"{tmp_path.name}/")
        return f"s3://data/{tmp_path.name}"

    return folder, address


def source_of(uri, **options):
    return open_source(DataConfig(source=str(uri), **options))


def shard(file: Path, members: Members, **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


FIRST: Members = [
    ("0001.cls", b"7\n"),
    ("0001.jpg", JPEG),
    ("0001.txt", b"a caption"),
    ("./0000.json", json.dumps({"label": "cat", "split": "test", "complexity": 3}).encode()),
    ("./0000.depth.png", DEPTH),
    ("./0000.PNG", PNG),
    ("./0000.mask.png", MASK),
    ("._0002.jpg", b"a Macintosh was here"),
    ("0003.txt", b"no image"),
    (f"{LONG}é.webp", saved(picture(20, 16), "WEBP")),
]


def test_samples_of_shards(place):
    folder, address = place
    shard(folder / "x-1.tar", FIRST)
    shard(folder / "train/x-0.tar", [("k/9.png", PNG), ("k/8.png", JPEG)], format=tarfile.GNU_FORMAT)
    (folder / "README.md").write_text("two shards")
    uri = address()
    source = source_of(uri)
    assert isinstance(source, TarSource)
    listed = {item.path: item for item in source.list()}
    assert list(listed) == sorted(listed) == [
        "train/x-0.tar/k/8.png", "train/x-0.tar/k/9.png",
        "x-1.tar/0000.PNG", "x-1.tar/0001.jpg", f"x-1.tar/{LONG}é.webp"
    ]  # fmt: skip
    assert listed["x-1.tar/0000.PNG"].targets == Targets(
        "cat", "x-1.tar/0000.depth.png", "x-1.tar/0000.mask.png", "val", 3.0
    )
    assert listed["x-1.tar/0001.jpg"].targets == Targets(label="7")
    assert listed["train/x-0.tar/k/9.png"].targets == Targets(split="train")
    item = listed["x-1.tar/0000.PNG"]
    assert item.size == max(len(PNG), len(DEPTH), len(MASK))
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    assert [again.read(path, item.etag) for path in (item.path, item.targets.depth, item.targets.mask)] == [
        PNG, DEPTH, MASK
    ]  # fmt: skip
    assert again.read("x-1.tar/0001.jpg", listed["x-1.tar/0001.jpg"].etag) == JPEG
    assert source.uri(item.path) == f"{uri}/x-1.tar/0000.PNG"
    assert len(list(source_of(uri, limit=3).list())) == 3


def test_patterns_name_shards(place):
    folder, address = place
    for number in range(12):
        shard(folder / f"s/t-{number:02d}.tar", [(f"{number}.png", PNG)])
    shard(folder / "s/val.tar", [("v.png", PNG)])
    (folder / "s/photo.png").write_bytes(PNG)
    uri = address()

    def names(pattern):
        return [item.path.split("/")[0] for item in source_of(f"{uri}/s/{pattern}").list()]

    assert names("t-{08..11}.tar") == ["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"]
    assert names("{t-03,val}.tar") == ["t-03.tar", "val.tar"]
    assert names("t-0*.tar") == [f"t-{number:02d}.tar" for number in range(10)]
    assert names("val.tar") == ["val.tar"]
    with pytest.raises(ValueError, match=r"t-12.tar is not there"):
        names("t-{08..12}.tar")
    with pytest.raises(ValueError, match="no .tar files there"):
        names("u*.tar")
    assert [item.path for item in source_of(f"{uri}/s").list()] == ["photo.png"]  # which sorts first
    (folder / "s/photo.png").rename(folder / "s/z.png")
    if not uri.startswith("s3"):
        with pytest.raises(ValueError, match=r"\.tar files and images \(z.png\) are below it; name the first as"):
            source_of(f"{uri}/s")


def test_braces_are_a_shells():
    assert expand("a-{9..11}.tar") == ["a-9.tar", "a-10.tar", "a-11.tar"]
    assert expand("a-{000..002}{x,y}.tar") == [f"a-00{n}{letter}.tar" for n in range(3) for letter in "xy"]
    assert expand("plain.tar") == ["plain.tar"]
    for wrong in ("a-{3..1}.tar", "a-{x}.tar", "{0..99999}{0..99999}.tar"):
        with pytest.raises(ValueError, match="data.source"):
            expand(wrong)


def test_the_digest_follows_the_shards_and_reads_none(server, monkeypatch, tmp_path):
    client = client_of(server)
    shard(tmp_path / "a.tar", FIRST * 20)
    upload(client, tmp_path, "data", "digest/")
    proxy = Proxy(server, lambda *_: None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        source = source_of("s3://data/digest")
        before = source.digest()
        assert not [1 for method, path, _ in proxy.requests if method == "GET" and "a.tar" in path]
    shard(tmp_path / "a.tar", FIRST[:2])
    upload(client, tmp_path, "data", "digest/")
    point(monkeypatch, server)
    assert source_of("s3://data/digest").digest() != before
    assert source.digest(listed="of members") == before  # of the shards that it lists, whatever is in them


def test_reading_one_image_does_not_read_the_shard(server, monkeypatch, tmp_path):
    shard(tmp_path / "a.tar", [(f"{number:03d}.png", bytes(400_000)) for number in range(30)])
    upload(client_of(server), tmp_path, "data", "big/")
    proxy = Proxy(server, lambda *_: None)
    monkeypatch.setattr("components.sources.tar.BUFFER_BYTES", 1 << 16)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        source = source_of("s3://data/big")
        listed = list(source.list())
        spans = [headers["Range"] for _, _, headers in proxy.requests if "Range" in headers]
        assert sum(_length(span) for span in spans) < 4_000_000  # of 12
        proxy.requests.clear()
        assert source.read(listed[7].path, listed[7].etag) == bytes(400_000)
        ((_, _, headers),) = proxy.requests
        assert _length(headers["Range"]) == 400_000 and "If-Match" in headers


def _length(span: str) -> int:
    first, last = span.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


def test_a_shard_that_changes_after_the_listing_is_an_error_that_is_tried_again(place):
    folder, address = place
    shard(folder / "a.tar", FIRST)
    source = source_of(address())
    item = next(source.list())
    shard(folder / "a.tar", FIRST[::-1])
    address()
    with pytest.raises(ChangedFile, match="has changed since it was listed"):
        source.read(item.path, item.etag)


@pytest.mark.parametrize(
    ("members", "cut", "said"),
    [
        ([("0.png", PNG), ("0.cls", b"\xff")], 0, "0.cls: UTF-8 is needed"),
        ([("0.png", PNG), ("0.json", b"{")], 0, "0.json: not JSON"),
        ([("0.png", PNG), ("0.json", b'{"label": [1]}')], 0, r"0.json: label = \[1\]: text or a whole number"),
        ([("0.png", PNG), ("0.json", b'{"complexity": "much"}')], 0, "0.json: complexity = 'much': a finite number"),
        ([("0.png", PNG), ("1.png", PNG), ("0.png", PNG)], 0, "/0.png': twice in its shard"),
        ([("0.png", PNG), ("1.png", PNG)], 700, "unexpected end of data|ends beyond the end"),
        ([("0.txt", b"nothing")], 0, "no images in the shards"),
    ],
)
def test_a_damaged_shard_is_one_error_that_names_it(tmp_path, members, cut, said):
    shard(tmp_path / "a.tar", members)
    if cut:
        (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"^data.source '{tmp_path}/a.tar.*({said})"):
        list(source_of(tmp_path).list())
    (tmp_path / "a.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(ValueError, match=f"^data.source '{tmp_path}/a.tar': "):
        list(source_of(tmp_path).list())


def test_looking_ahead_keeps_the_order_and_ends_when_it_is_left():
    assert list(ahead(lambda n: n * 2, range(100), 8)) == [n * 2 for n in range(100)]
    made = []
    stream = ahead(lambda n: made.append(n) or n, range(1000), 4)
    assert next(stream) == 0
    stream.close()
    assert len(made) < 20


# --- tables -----------------------------------------------------------------------------------------------------------


ROWS = {
    "image": [PNG, JPEG, b"broken", PNG, JPEG],
    "label": ["a", None, "b", "", "a"],
    "depth": [DEPTH, None, None, DEPTH, DEPTH],
    "mask": [None] * 5,
    "split": ["train", "test", None, "val", "train"],
    "complexity": [0.5, None, 0.25, None, 1],
    "note": [1, 2, 3, 4, 5],
}


def rows_of(**columns) -> pa.Table:
    kinds = {"image": pa.binary(), "depth": pa.binary(), "mask": pa.binary(), "label": pa.string()}
    return pa.table({name: pa.array(values, kinds.get(name)) for name, values in {**ROWS, **columns}.items()})


def test_rows_of_tables(place):
    folder, address = place
    pq.write_table(rows_of(), folder / "a.parquet", row_group_size=2)
    (folder / "more").mkdir()
    pq.write_table(pa.table({"image": [JPEG], "label": [3]}), folder / "more/b.parquet")
    uri = address()
    source = source_of(uri)
    assert isinstance(source, TableSource)
    listed = list(source.list())
    assert [item.path for item in listed] == [*(f"a.parquet/{n:09d}" for n in range(5)), "more/b.parquet/000000000"]
    assert [item.targets.label for item in listed] == ["a", None, "b", None, "a", "3"]
    assert [item.targets.split for item in listed] == ["train", "val", None, "val", "train", None]
    assert [item.targets.depth is not None for item in listed] == [True, False, False, True, True, False]
    assert not any(item.targets.mask for item in listed)
    assert [item.targets.complexity for item in listed] == [0.5, None, 0.25, None, 1, None]
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(item.path, item.etag) for item in listed] == [PNG, JPEG, b"broken", PNG, JPEG, JPEG]
    assert again.read(listed[3].targets.depth, listed[3].etag) == DEPTH
    assert [item.path for item in source_of(f"{uri}/*.parquet").list()] == [item.path for item in listed[:5]]
    before = source.digest()
    pq.write_table(rows_of(), folder / "a.parquet", row_group_size=3)
    address()
    assert source_of(uri).digest() != before
    with pytest.raises(ChangedFile):
        source.read(listed[4].path, listed[4].etag.replace(" 2 0", " 1 0"))


def test_images_of_hugging_face(tmp_path):
    images = [{"bytes": PNG, "path": None}, {"bytes": JPEG, "path": "x.jpg"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, kind), "label": [0, 1]}), tmp_path / "a.parquet")
    source = source_of(tmp_path / "a.parquet")
    assert [source.read(item.path, item.etag) for item in source.list()] == [PNG, JPEG]
    assert [item.targets.label for item in source.list()] == ["0", "1"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pa.table({"picture": [PNG]}), r"columns are \['picture'\]; image or uri is needed"),
        (pa.table({"image": ["a.png"]}), "column image is string; bytes are needed"),
        (pa.table({"image": [PNG], "label": [0.5]}), "column label is double; text or whole numbers"),
        (pa.table({"image": [PNG], "split": ["dev"]}), "row 0: split = 'dev': allowed are train, val, test"),
        (pa.table({"image": pa.array([], pa.binary())}), "no rows"),
    ],
)
def test_a_table_of_another_kind_is_an_error_that_names_it(tmp_path, table, said):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"^data.source '{tmp_path}/a.parquet'.*{said}"):
        list(source_of(tmp_path / "a.parquet").list())


def test_row_groups_too_large_to_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("components.sources.table.MAX_GROUP_BYTES", 4000)
    pq.write_table(
        pa.table({"image": [bytes(600)] * 4}), tmp_path / "a.parquet", row_group_size=1, use_dictionary=False
    )
    assert len(list(source_of(tmp_path).list())) == 4
    pq.write_table(pa.table({"image": [bytes(range(256)) * 90]}), tmp_path / "a.parquet", compression="none")
    with pytest.raises(ValueError, match="row group 0 has .* at most 4000 are allowed; write the table with smaller"):
        list(source_of(tmp_path).list())


def test_what_is_no_table_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=f"^data.source '{tmp_path}/a.parquet': not a Parquet table"):
        source_of(tmp_path)


def test_a_table_of_addresses_is_a_manifest(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(PNG)
    pq.write_table(pa.table({"uri": ["in/a.png", "in/b.png"], "label": [1, 2]}), tmp_path / "list.parquet")
    source = source_of(tmp_path / "list.parquet")
    assert isinstance(source, ManifestSource)
    assert [(item.path, item.targets.label) for item in source.list()] == [("in/a.png", "1"), ("in/b.png", "2")]
    assert isinstance(source_of(tmp_path / "in"), FolderSource)


# --- into an ImageSet -------------------------------------------------------------------------------------------------


def test_the_same_images_from_shards_and_from_a_table(place, tmp_path):
    folder, address = place
    depth, mask = ROWS["depth"][0], MASK
    members: Members = []
    for number, image in enumerate([PNG, JPEG, b"broken"]):
        members += [(f"{number}.jpg", image), (f"{number}.cls", b"x")]
        members += [(f"{number}.depth.png", depth), (f"{number}.mask.png", mask)] if number == 0 else []
    (folder / "tar").mkdir()
    shard(folder / "tar/a.tar", members)
    (folder / "table").mkdir()
    columns = {
        "image": [PNG, JPEG, b"broken"],
        "label": ["x"] * 3,
        "depth": [depth, None, None],
        "mask": [mask] + [None] * 2,
    }
    kinds = {name: pa.array(values) for name, values in columns.items()}
    pq.write_table(pa.table(kinds), folder / "table/a.parquet")
    uri = address()
    found = {}
    for kind in ("tar", "table"):
        config = IngestStageConfig(data=DataConfig(source=f"{uri}/{kind}", image_size=16), limits=IngestConfig())
        work = Work(open_source(config.data), config, str(tmp_path / kind))
        write_blocks(work.source.list(), f"{work.output}/blocks", files_per_block=8)
        tally = decode_block(0, work)
        assert (tally.images, tally.rejected, tally.depth, tally.mask, tally.labels) == (2, 1, 1, 1, {"x"})
        assert f"{uri}/{kind}/a." in tally.reasons[0]
        table = pq.read_table(tmp_path / kind / "table").drop_columns(["image_id", "uri", "split"])
        found[kind] = table.to_pylist()
    assert found["tar"] == found["table"]
