"""A manifest as a source: what its rows mean, what changes its listing, and what is wrong with a bad one."""

import csv
import gc
import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest
from broken import picture, saved

from components.config import DataConfig
from components.sources import ALLOWED, Targets, open_source
from pipelines.cli import main
from pipelines.config import load_config

FULL = {"uri": "a.png", "label": "cat", "depth": "d.png", "mask": "m.png", "split": "train"}


def source_of(file: Path, **options):
    return open_source(DataConfig(source=str(file), **options))


def write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return file


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(saved(picture(20, 16), "PNG"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".CSV"])
def test_rows_become_objects_sorted_by_path(tmp_path, suffix):
    put(tmp_path / "in", "b/1.png", "a.png", "ü é.png", "a,b.png", "d.png", "m.png")
    put(tmp_path / "out", "far.png")
    rows = [
        {"uri": "ü é.png", "label": "", "split": "test"},
        {"uri": f"{tmp_path}/out/far.png", "label": "0", "split": "", "complexity": "2.5"},
        {"uri": "./b//1.png", "mask": "b/../m.png", "split": "val"},
        {"uri": "a,b.png", "label": 'say "cat"\nor dog', "note": "ignored"},
        FULL,
    ]
    source = source_of(write(tmp_path / f"in/list{suffix}", rows))
    found = {item.path: item for item in source.list()}
    assert list(found) == sorted(found)
    assert {path: item.targets for path, item in found.items()} == {
        f"{tmp_path}/out/far.png": Targets(label="0", complexity=2.5),
        "a,b.png": Targets(label='say "cat"\nor dog'),
        "a.png": Targets(label="cat", depth="d.png", mask="m.png", split="train"),
        "b/1.png": Targets(mask="m.png", split="val"),
        "ü é.png": Targets(split="val"),
    }
    for path, item in found.items():
        assert source.read(path) == Path(source.uri(path)).read_bytes()
        assert item.size >= Path(source.uri(path)).stat().st_size
    assert source.uri("b/1.png") == f"{tmp_path}/in/b/1.png"
    assert [item.path for item in source_of(Path(source.file), limit=2).list()] == list(found)[:2]


def test_csv_and_json_lines_give_the_same_listing(tmp_path):
    put(tmp_path, "a.png", "d.png", "m.png")
    ours = [source_of(write(tmp_path / f"list{suffix}", [FULL])) for suffix in (".csv", ".jsonl")]
    assert list(ours[0].list()) == list(ours[1].list()) and ours[0].digest() == ours[1].digest()


def test_spreadsheets_and_windows_write_good_manifests(tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbfuri,label\r\n\r\nb.png,\r\na.png,caf\xc3\xa9\r\n\r\n")
    assert [(item.path, item.targets.label) for item in source_of(tmp_path / "list.csv").list()] == [
        ("a.png", "café"), ("b.png", None)
    ]  # fmt: skip
    (tmp_path / "list.jsonl").write_text('\n{"uri": "a.png", "label": 7, "depth": null}\n\n')
    assert next(source_of(tmp_path / "list.jsonl").list()).targets == Targets(label="7")


def test_every_change_of_a_row_or_of_its_files_changes_its_etag_alone(tmp_path):
    put(tmp_path, "a.png", "d.png", "m.png", "d2.png", "other.png")
    other = {"uri": "other.png"}
    seen = set()

    def note(row: dict, *, rows: int = 2) -> None:
        source = source_of(write(tmp_path / "list.csv", [other, row]))
        item, unchanged = source.list()
        assert unchanged.etag == kept
        seen.add((item.etag, source.digest()))

    kept = list(source_of(write(tmp_path / "list.csv", [FULL, other])).list())[1].etag
    note(FULL)
    note(FULL)
    assert len(seen) == 1
    for change in ({"label": "dog"}, {"label": ""}, {"split": "val"}, {"depth": ""}, {"depth": "d2.png"}, {"mask": ""}):
        note(FULL | change)
    for changed in ("a.png", "d.png", "m.png"):
        os.utime(tmp_path / changed, ns=(1, 1))
        note(FULL)
    (tmp_path / "m.png").write_bytes(b"other")
    note(FULL)
    (tmp_path / "m.png").unlink()
    note(FULL)
    assert len(seen) == len({etag for etag, _ in seen}) == len({digest for _, digest in seen}) == 12


def test_files_that_are_no_files_are_listed_and_cannot_be_read(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    rows = [{"uri": uri} for uri in ("folder", "pipe", "gone.png", "list.csv/x.png")]
    source = source_of(write(tmp_path / "list.csv", rows))
    for item in source.list():
        with pytest.raises(FileNotFoundError):
            source.read(item.path)


BAD = {
    "no uri": (b"image,label\na.png,cat\n", 1, r"the columns are \['image', 'label'\]: uri is needed; label, depth"),
    "semicolons": (b"uri;label\na.png;cat\n", 1, r"\['uri;label'\]: uri is needed"),
    "a column twice": (b"uri,label,label\na.png,cat,dog\n", 1, "each once"),
    "nothing": (b"", 1, r"the columns are \[\]: uri is needed"),
    "only a header": (b"uri,label\n", None, "no rows in it"),
    "the same image": (b"uri\nb.png\na.png\n./b.png\n", 4, "uri 'b.png' is that of line 2 too: once"),
    "a bad split": (b"uri,split\na.png,train\nb.png,dev\n", 3, "split = 'dev': allowed are train, val, test"),
    "a word for a score": (b"uri,complexity\na.png,1\nb.png,much\n", 3, "complexity = 'much': a finite number"),
    "no end of complexity": (b"uri,complexity\na.png,inf\n", 2, "complexity = 'inf': a finite number"),
    "no image": (b"uri,label\na.png,cat\n ,dog\n", 3, "uri is empty: the path of an image is needed"),
    "leaves": (b"uri\na.png\n../b.png\n", 3, "uri = '../b.png': a path below '.*', or an absolute one"),
    "leaves in the end": (b"uri,mask\na.png,m/../../m.png\n", 2, "mask = 'm/../../m.png': a path below"),
    "the folder": (b"uri,depth\na.png,.\n", 2, "depth = '.': a path below"),
    "an address": (b"uri\nhttps://host/a.png\n", 2, "uri = 'https://host/a.png': a path below"),
    "latin-1": (b"uri\na.png\ncaf\xe9.png\n", 3, "byte 0xe9 is not UTF-8"),
    "utf-16": ("uri\na.png\n".encode("utf-16"), 1, "byte 0xff is not UTF-8"),
    "a stray comma": (b"uri,label\na.png,cat,dog\n", 2, "3 values; as many as the header's are needed, 2"),
    "a short row": (b'uri,label\n"a\n.png",cat\nb.png\n', 4, "1 values; as many as the header's are needed, 2"),
    "an open quote": (b'uri\n"a.png\nb.png\n', 3, "not CSV"),
    "a binary file": (bytes(2_000_000), 1, "too long: at most 1000000 bytes"),
    "a zero": (b"uri\na\0.png\n", 2, r"uri = 'a\\x00.png': text is needed"),
    "a long name": (b"uri\n" + b"a" * 5000 + b"\n", 2, "'aaa.*…: File name too long; a path of a file is needed"),
}
BAD_LINES = {
    "no JSON": (b'{"uri": "a.png"}\nuri,label\n', 2, "not JSON"),
    "a list": (b'["a.png"]\n', 1, r"\['a.png'\]: an object is needed, with a path as uri"),
    "no uri": (b'{"image": "a.png"}\n', 1, "uri is empty"),
    "a number": (b'{"uri": 3}\n', 1, "uri = 3: text is needed"),
    "a list of labels": (b'{"uri": "a.png", "label": ["cat"]}\n', 1, r"label = \['cat'\]: text is needed"),
    "a truth": (b'{"uri": "a.png", "label": true}\n', 1, "label = True: text is needed"),
    "beyond floats": (b'{"uri": "a.png", "complexity": 1%s}\n' % (b"0" * 400), 1, "complexity = 10+…: a finite number"),
    "a truth for a score": (b'{"uri": "a.png", "complexity": true}\n', 1, "complexity = True: a finite number"),
    "half a character": (b'{"uri": "\\ud800.png"}\n', 1, "can't be written as UTF-8"),
    "a well": (b"[" * 100_000, 1, "not JSON"),
    "nothing": (b"\n\n", None, "no rows in it"),
}


@pytest.mark.parametrize(("suffix", "bad"), [("csv", b) for b in BAD] + [("jsonl", b) for b in BAD_LINES])
def test_a_mistake_is_one_error_that_names_file_line_and_what_is_allowed(tmp_path, suffix, bad):
    data, line, said = (BAD if suffix == "csv" else BAD_LINES)[bad]
    file = tmp_path / f"list.{suffix}"
    file.write_bytes(data)
    place = re.escape(str(file)) + ("'" if line is None else f"', line {line}")
    with pytest.raises(ValueError, match=f"^data.source '{place}: .*{said}") as caught:
        next(source_of(file).list())
    assert type(caught.value) is ValueError and len(str(caught.value).splitlines()) == 1


def test_a_missing_manifest_and_a_folder_of_that_name(tmp_path):
    with pytest.raises(ValueError, match=f"there is no such file .*; {ALLOWED}"):
        source_of(tmp_path / "gone.csv")
    put(tmp_path / "photos.csv", "cat/1.png")
    assert [item.targets.label for item in source_of(tmp_path / "photos.csv").list()] == ["cat"]


def test_a_run_config_names_a_manifest_from_where_one_stands(tmp_path, monkeypatch, capsys):
    put(tmp_path / "in", "a.png")
    file = write(tmp_path / "in/list.csv", [{"uri": "a.png"}])
    monkeypatch.chdir(tmp_path)
    assert load_config("demo", ["data.source=in/list.csv"]).data.source == str(file)
    file.write_text("name\na.png\n")
    assert main(["plan", "demo", "--set", "data.source=in/list.csv", "--set", f"workspace={tmp_path}/w"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: data.source '{file}', line 1: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_are_held_once_and_packed(tmp_path, suffix):
    """tracemalloc's peak while listing, without what it keeps for itself."""
    rows = [{"uri": f"images/{i:08d}.jpg", "label": f"class {i % 9}", "mask": f"m/{i:08d}.png"} for i in range(20_000)]
    random.Random(0).shuffle(rows)
    source = source_of(write(tmp_path / f"list{suffix}", rows))
    gc.collect()
    tracemalloc.start()
    paths = sum(1 for _ in source.list())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert paths == 20_000 and peak < 20_000 * 160
