"""What files are called, what of an earlier table is taken over, and how listings are compared."""

import gc
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components import parts
from components.artifacts import IMAGES_SCHEMA, Draft, ImageSet, Job, Manifest, read_manifest
from components.config import DataConfig, InferenceResources, IngestResources, IngestStageConfig
from components.ingest import Work, decode_block, ingest, write_blocks
from components.ingest.decode import Shrunk, shrink
from components.ingest.listing import Changes, Listed, Numbering, digest, merge, read_listing, sort_out
from components.ingest.tally import Tally
from components.mapping import Mapping, map_parts
from components.parts import Earlier, kept_name, link_files, part_name, part_names, plan_parts, read_part, root_of
from components.sources import SourceObject, Targets, open_source
from components.store import filesystem
from tests.by_hand import Photographs, photographs
from tests.nightly import photographs as write_photographs
from tests.s3_server import client_of, point, s3_server

CODES = ("codes",)


@pytest.fixture(scope="module")
def made() -> Photographs:
    return photographs(24)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as endpoint:
        client_of(endpoint).create_bucket(Bucket="work")
        yield endpoint


@pytest.fixture(params=["disk", "bucket"])
def space(request: pytest.FixtureRequest, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the test's own, on each kind of store."""
    if request.param == "disk":
        return str(tmp_path)
    point(monkeypatch, server)
    return f"s3://work/{tmp_path.name}"


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_says_what_the_rows_are(made: Photographs) -> None:
    name = part_name(3, made.rows[:4])
    assert name.startswith("part-000003-") and name == part_name(3, [dict(row) for row in made.rows[:4]])
    for other in (made.rows[:3], made.rows[1:5], made.rows[3::-1], [*made.rows[:3], {**made.rows[3], "split": "?"}]):
        assert part_name(3, other) != name
    assert part_name(0, [{"label": None}]) != part_name(0, [{"label": "None"}])
    ids = [row["image_id"] for row in made.rows[:4]]
    kept = kept_name(name, ids[:2])
    assert root_of(kept) == root_of(name) == name.removesuffix(".parquet")
    assert kept_name(kept, ids[:1]) == kept_name(name, ids[:1]) != kept_name(name, ids[1:2])


# --- taking over ------------------------------------------------------------------------------------------------------


def write(folder: str, name: str, table: pa.Table) -> None:
    store, path = filesystem(folder)
    store.create_dir(path, recursive=True)
    pq.write_table(table, f"{path}/{name}", filesystem=store)


def images_of(made: Photographs, rows: Sequence[int]) -> pa.Table:
    return pa.Table.from_pylist([made.rows[row] for row in rows], IMAGES_SCHEMA)


def codes_of(made: Photographs, rows: Sequence[int]) -> pa.Table:
    lists = pa.array([made.codes[row] for row in rows], pa.list_(pa.from_numpy_dtype(made.codes.dtype)))
    return pa.table({"image_id": [made.rows[row]["image_id"] for row in rows], "codes": lists})


def test_files_are_linked_gathered_or_made(made: Photographs, space: str) -> None:
    whole, other, new = range(8), range(8, 16), range(16, 24)
    names = [part_name(number, [made.rows[row] for row in rows]) for number, rows in enumerate((whole, other, new))]
    write(f"{space}/earlier", names[0], codes_of(made, whole))
    write(f"{space}/earlier", names[1], codes_of(made, other))
    left = [15, 9, 12]
    shrunk = kept_name(names[1], [made.rows[row]["image_id"] for row in left])
    write(f"{space}/images", names[0], images_of(made, whole))
    write(f"{space}/images", shrunk, images_of(made, left))
    earlier = Earlier(f"{space}/earlier", {"codes": "codes"}, same=True)

    plan = plan_parts(f"{space}/images", CODES, [earlier])
    assert plan.linked == {f"{space}/earlier": [names[0]]} and not plan.new
    mapping = Mapping([f"{space}/images"], f"{space}/new", _never, InferenceResources(), [["image_id"]])
    totals = map_parts(plan, lambda _: mapping, target=mapping.target, progress=lambda _: None)
    assert totals == {"rows": 11, "made": 0}
    assert part_names(f"{space}/new") == [names[0], shrunk]
    for name, rows in ((names[0], whole), (shrunk, left)):
        assert read_part(f"{space}/new", name, ["image_id", "codes"]).equals(codes_of(made, rows))
    if not space.startswith("s3"):
        assert os.path.samefile(f"{space}/earlier/{names[0]}", f"{space}/new/{names[0]}")

    write(f"{space}/images", names[2], images_of(made, new))
    grown = plan_parts(f"{space}/images", CODES, [earlier])
    assert [(part.name, part.new) for part in grown.parts if part.new] == [(names[2], {"codes"})]
    back = [8, 9, 10]
    write(f"{space}/images", shrunk, images_of(made, back))
    smaller = Earlier(f"{space}/new", {"codes": "codes"}, same=True)
    reappeared = kept_name(names[1], [made.rows[row]["image_id"] for row in back])
    write(f"{space}/again", reappeared, images_of(made, back))
    (part,) = plan_parts(f"{space}/again", CODES, [smaller]).parts
    assert part.new == {"codes"}, "an earlier file of the same root that lacks some of the images is of no use"
    (part,) = plan_parts(f"{space}/again", CODES, [smaller, earlier]).parts
    assert not part.new and part.taken[0].file == f"{space}/earlier/{names[1]}"


def _never() -> None:
    raise AssertionError("nothing is to be made")


def test_columns_come_from_where_they_are(made: Photographs, tmp_path: Path) -> None:
    rows = range(6)
    name = part_name(0, [made.rows[row] for row in rows])
    write(f"{tmp_path}/images", name, images_of(made, rows))
    codes = codes_of(made, rows)
    write(f"{tmp_path}/old", name, codes.rename_columns(["image_id", "a"]))
    write(f"{tmp_path}/older", name, codes.rename_columns(["image_id", "b"]))
    old, older = (Earlier(f"{tmp_path}/{f}", {c: c.upper()}, same=True) for f, c in (("old", "a"), ("older", "b")))
    (part,) = plan_parts(f"{tmp_path}/images", ["A", "B", "C"], [replace(old, same=False)]).parts
    assert part.new == {"B", "C"}
    plan = plan_parts(f"{tmp_path}/images", ["A", "B"], [replace(old, same=False), replace(older, same=False)])
    mapping = Mapping([f"{tmp_path}/images"], f"{tmp_path}/new", _never, InferenceResources(), [["image_id"]])
    map_parts(plan, lambda _: mapping, target=mapping.target, progress=lambda _: None)
    assert pq.read_table(f"{tmp_path}/new/{name}").column_names == ["image_id", "A", "B"]


def test_a_link_is_a_copy_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.parquet").write_bytes(b"rows")

    def refuse(*_: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_files(f"{tmp_path}/a", f"{tmp_path}/b", ["one.parquet"])
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["one.parquet"]
    assert (tmp_path / "b/one.parquet").read_bytes() == b"rows"
    with pytest.raises(FileNotFoundError):
        link_files(f"{tmp_path}/a", f"{tmp_path}/b", ["none.parquet"])


def test_what_is_taken_over_goes_on_without_where_it_came_from(made: Photographs, space: str) -> None:
    name = part_name(0, made.rows[:4])
    write(f"{space}/a", name, images_of(made, range(4)))
    link_files(f"{space}/a", f"{space}/b", [name])
    store, path = filesystem(f"{space}/a")
    store.delete_dir(path)
    assert len(read_part(f"{space}/b", name, ["image"])) == 4
    parts.remove_others(f"{space}/b", [])
    assert part_names(f"{space}/b") == []


# --- listings ---------------------------------------------------------------------------------------------------------

PATHS = st.text("ab/é😀", min_size=1, max_size=4)
LISTINGS = st.dictionaries(
    PATHS, st.tuples(st.integers(0, 1), st.sampled_from(["x", "y"]), st.sampled_from([None, "l"]))
)


def objects(listing: dict[str, tuple]) -> list[SourceObject]:
    return [SourceObject(path, size, etag, Targets(label)) for path, (size, etag, label) in sorted(listing.items())]


@settings(max_examples=300, deadline=None)
@given(old=LISTINGS, new=LISTINGS)
def test_every_object_is_told_apart(old: dict[str, tuple], new: dict[str, tuple]) -> None:
    before = {item.path: (item, number // 3) for number, item in enumerate(objects(old))}
    found = list(merge(iter(before.values()), iter(objects(new))))
    assert sorted(one.item.path for one in found) == sorted({*old, *new})
    for one in found:
        path = one.item.path
        expected = "added" if path not in old else "removed" if path not in new else "changed"
        if path in old and old[path] == new.get(path):
            expected = "reused"
        assert one.state == expected
        assert one.part == (before[path][1] if path in old else None)
        assert one.item == (before[path][0] if expected == "removed" else SourceObject(path, *_rest(new[path])))


def _rest(value: tuple) -> tuple:
    size, etag, label = value
    return size, etag, Targets(label)


@settings(max_examples=50, deadline=None)
@given(old=LISTINGS, new=LISTINGS.filter(bool), per_block=st.integers(1, 3))
def test_the_listing_says_which_part_has_what(tmp_path_factory, old: dict, new: dict, per_block: int) -> None:
    uri = str(tmp_path_factory.mktemp("listing"))
    source = open_source(DataConfig(source="demo"))
    before = [(item, number // 3) for number, item in enumerate(objects(old))]
    changes, numbering = Changes(), Numbering(first=100, files_per_block=per_block)
    decoded = list(sort_out(merge(iter(before), iter(objects(new))), source, numbering, uri, changes))
    listed = list(read_listing(uri))
    assert [item for item, _ in listed] == objects(new)
    where = {item.path: part for item, part in listed}
    assert [where[item.path] for item in decoded] == [100 + place // per_block for place in range(len(decoded))]
    kept = {path: part for path, part in where.items() if part < 100}
    assert kept == {item.path: part for item, part in before if new.get(item.path) == old[item.path]}
    assert (changes.reused, changes.to_decode) == (len(kept), len(decoded))
    gone = {(part, digest(source.uri(item.path))) for item, part in before if item.path not in kept}
    assert gone == {
        (part, bytes(some[at : at + 8])) for part, some in changes.gone.items() for at in range(0, len(some), 8)
    }


def test_comparing_listings_streams(tmp_path: Path) -> None:
    source = open_source(DataConfig(source="demo"))

    def listing(count: int) -> Iterator[SourceObject]:
        return (SourceObject(f"{index:07d}.png", index, str(index)) for index in range(count))

    def peak(count: int) -> int:
        uri = str(tmp_path / str(count))
        list(sort_out((Listed(item, "reused", 0) for item in listing(count)), source, Numbering(1, 64), uri, Changes()))
        gc.collect()
        tracemalloc.start()
        found = merge(read_listing(uri), listing(count))
        assert not list(sort_out(found, source, Numbering(1, 64), f"{uri}_new", Changes()))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1_000)
    assert peak(60_000) < 1.5 * peak(20_000)


# --- parts that lose rows ---------------------------------------------------------------------------------------------


def test_a_part_without_rows_that_have_gone(tmp_path: Path) -> None:
    write_photographs(tmp_path / "in", range(5))
    for name in ("bad1.png", "bad2.png"):
        (tmp_path / "in" / name).write_bytes(b"no image")
    config = IngestStageConfig(data=DataConfig(source=f"{tmp_path}/in", image_size=32))
    source = open_source(config.data)
    work = Work(source, config, f"{tmp_path}/base")
    write_blocks(source.list(), f"{tmp_path}/base/blocks", files_per_block=9)
    before = decode_block(0, work)
    later = replace(work, output=f"{tmp_path}/new", base=f"{tmp_path}/base")

    def without(*names: str) -> tuple:
        gone = b"".join(digest(source.uri(name)) for name in names)
        after = shrink(Shrunk(before, gone), later)
        return after, shrink(Shrunk(before, gone), later)

    after, again = without("00001.png", "bad1.png")
    assert after == again and (after.images, after.rejected, after.part) == (4, 1, 0)
    assert root_of(after.file) == root_of(before.file) and after.file != before.file
    whole, left = (pq.read_table(f"{tmp_path}/{folder}/table/{file}") for folder, file in
                   (("base", before.file), ("new", after.file)))  # fmt: skip
    assert left.equals(whole.take([0, 2, 3, 4])) and left.schema.equals(whole.schema)
    after, _ = without("bad2.png")
    assert after.file == before.file
    assert os.path.samefile(f"{tmp_path}/base/table/{after.file}", f"{tmp_path}/new/table/{after.file}")
    after, _ = without(*(f"{number:05d}.png" for number in range(5)))
    assert (after.file, after.images, after.rejected, after.rejects) == ("", 0, 2, before.rejects)


def test_a_file_that_may_be_read_again_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photographs(tmp_path / "in", range(4))
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    monkeypatch.setattr("components.ingest.stage.make_parts", in_this_process)
    read, forbidden = Path.read_bytes, {"00002.png", "00003.png"}

    def refusing(path: Path) -> bytes:
        if path.name in forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    config = IngestStageConfig(data=DataConfig(source=f"{tmp_path}/in", image_size=32))

    def night(key: str) -> dict[str, Any]:
        draft = Draft(str(tmp_path / "w"), "ingest", key)
        job = Job("ingest", key, str(tmp_path / "w"), draft.uri, str(tmp_path / "scratch"))
        told = ingest(job, config=config, resources=IngestResources())
        about = {"config": config.model_dump(mode="json"), "counts": told}
        manifest = Manifest("image_set", ImageSet.version, "ingest", key, {}, **about)
        draft.commit(manifest, replaces=read_manifest(draft.final))
        return {name: told[name] for name in ("images", "rejected", "unreadable", "changed", "reused")}

    assert night("a") == {"images": 2, "rejected": 3, "unreadable": 2, "changed": 0, "reused": 0}
    forbidden.remove("00002.png")
    assert night("b") == {"images": 3, "rejected": 2, "unreadable": 1, "changed": 2, "reused": 3}
    forbidden.clear()
    assert night("b") == {"images": 4, "rejected": 1, "unreadable": 0, "changed": 1, "reused": 4}
    assert night("c") == {"images": 4, "rejected": 1, "unreadable": 0, "changed": 0, "reused": 5}
    (left,) = pq.read_table(tmp_path / "w/ingest/c/rejected").to_pylist()
    assert left["uri"].endswith("bad.png") and len(pq.read_table(tmp_path / "w/ingest/c/table")) == 4


def in_this_process(work: Work, num_blocks: int, *_: object) -> Iterator[Tally]:
    """As make_parts, without Ray."""
    yield from (shrink(one, work) for one in work.shrunk)
    yield from (decode_block(block, work) for block in range(num_blocks))
