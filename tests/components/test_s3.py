"""Buckets as sources, against a real S3 API, straight and through a bad network."""

import csv
import json
import pickle
import random
import time
from pathlib import Path

import pytest
from broken import picture, saved

from components import buckets
from components.config import BaseStageConfig, DataConfig, IngestConfig, IngestStageConfig, S3Settings, TrainConfig
from components.ingest import Work, decode_block, write_blocks
from components.sources import Targets, open_source
from components.sources.folder import FolderSource
from components.sources.manifest import ManifestSource
from components.sources.places import ChangedFile
from components.sources.s3 import Bucket
from model.config import BaseObjectiveConfig
from pipelines.cli import main
from pipelines.cluster import stage_environment
from pipelines.failures import diagnose
from tests.s3_server import KEYS, Fault, Proxy, client_of, point, reset, s3_server, upload

PNG = saved(picture(20, 16), "PNG")
NAMES = ("b/2.jpg", "a.png", "a/z.png", "ü é/+&?.png", "train/cat/1.png", "test/9.PNG", "notes.txt", ".hidden/1.png")


@pytest.fixture(scope="module")
def server():
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(server, monkeypatch):
    """A client of the server, which this process uses too; bucket ``photos`` is new and empty."""
    point(monkeypatch, server)
    client = client_of(server)
    reset(server)
    client.create_bucket(Bucket="photos")
    return client


def source_of(uri, **options):
    return open_source(DataConfig(source=str(uri), **options))


def put(client, *keys: str, body: bytes = PNG) -> None:
    for key in keys:
        client.put_object(Bucket="photos", Key=key, Body=body)


@pytest.mark.parametrize("prefix", ["", "in/here/"])
def test_a_prefix_is_a_folder_with_the_same_listing_order_labels_and_splits(s3, tmp_path, prefix):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    upload(s3, tmp_path, "photos", prefix)
    put(s3, "in/here.png", "in/here2/x.png")
    ours, local = source_of(f"s3://photos/{prefix}"), source_of(tmp_path)
    assert isinstance(ours, FolderSource)
    listed = [item for item in ours.list() if prefix or not item.path.startswith("in/")]
    assert [(i.path, i.size, i.targets) for i in listed] == [(i.path, i.size, i.targets) for i in local.list()]
    assert all(ours.read(item.path, item.etag) == PNG for item in listed)
    assert ours.uri("a.png") == f"s3://photos/{prefix}a.png"
    again = pickle.loads(pickle.dumps(ours))
    assert again == ours and again.digest() == ours.digest()
    assert len(list(source_of(f"s3://photos/{prefix}", limit=2).list())) == 2


def test_listing_goes_page_by_page_and_is_known_as_it_comes(s3, server, monkeypatch):
    put(s3, *(f"{number:04d}.png" for number in range(110)))
    monkeypatch.setattr("components.sources.s3.PAGE", 50)
    proxy = Proxy(server, lambda *_: None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        objects = source_of("s3://photos").list()
        before = len(proxy.requests)
        assert next(objects).path == "0000.png"
        pages = [path for method, path, _ in proxy.requests[before:] if method == "GET"]
        assert len(pages) == 1  # of three
        assert [item.path for item in objects] == [f"{number:04d}.png" for number in range(1, 110)]
        assert len([1 for method, path, _ in proxy.requests[before:] if method == "GET"]) == 3


def test_a_changed_object_changes_the_digest_and_is_read_as_it_is_now(s3, caplog):
    put(s3, "a.png", "b.png")
    source = source_of("s3://photos")
    before, (first, *_) = source.digest(), source.list()
    put(s3, "a.png", body=PNG + b"more")
    assert source.digest() != before
    assert source.read(first.path, first.etag) == PNG + b"more"
    assert "s3://photos/a.png has changed since it was listed" in caplog.text
    s3.delete_object(Bucket="photos", Key="a.png")
    with pytest.raises(FileNotFoundError, match="No such object"):
        source.read(first.path, first.etag)


def test_a_span_of_a_changed_object_is_refused(s3):
    put(s3, "a.png")
    place = Bucket.open("s3://photos")
    (file,) = place.list((".png",))
    assert place.read_span(file, 3, 5) == PNG[3:8] and place.read_span(file, 3, 0) == b""
    put(s3, "a.png", body=PNG[::-1])
    with pytest.raises(ChangedFile):
        place.read_span(file, 3, 5)


def test_large_objects_in_parts_have_an_etag_that_is_no_md5(s3):
    body = random.Random(0).randbytes(6 << 20)
    upload_ = s3.create_multipart_upload(Bucket="photos", Key="a.png")
    parts = [
        {"PartNumber": n, **{"ETag": s3.upload_part(Bucket="photos", Key="a.png", PartNumber=n, Body=part,
                                                    UploadId=upload_["UploadId"])["ETag"]}}
        for n, part in ((1, body[: 5 << 20]), (2, body[5 << 20 :]))
    ]  # fmt: skip
    s3.complete_multipart_upload(
        Bucket="photos", Key="a.png", UploadId=upload_["UploadId"], MultipartUpload={"Parts": parts}
    )
    (item,) = source_of("s3://photos").list()
    assert "-" in item.etag and source_of("s3://photos").read(item.path, item.etag) == body


# --- what is wrong ----------------------------------------------------------------------------------------------------


def one_line(capfd, *arguments: str, code: int = 2) -> str:
    """What a command says that must end with ``code`` and one line."""
    assert main(arguments) == code
    said = capfd.readouterr().err
    assert "Traceback" not in said and KEYS["AWS_SECRET_ACCESS_KEY"] not in said
    (line,) = said.splitlines()
    return line


PLAN = ("plan", "demo", "--set", "data.source=s3://photos/in")


def test_wrong_address_is_one_line_before_any_work(s3, monkeypatch, capfd):
    def said(*overrides):
        return one_line(capfd, *PLAN, *(word for text in overrides for word in ("--set", text)))

    assert said() == "error: data.source 's3://photos/in': no image files in it or below; suffixes that count: " + (
        ".jpg .jpeg .png .webp .bmp .gif .tif .tiff"
    )
    put(s3, "in/a.png")
    assert "data.source 's3://nowhere/x': there is no such bucket" in said("data.source=s3://nowhere/x")
    assert "workspace 's3://nowhere/w': there is no such bucket" in said("workspace=s3://nowhere/w")
    assert "s3://BUCKET/PREFIX is needed" in said("data.source=s3://")
    assert "s3.endpoint_url = 'host:9'" in said("s3.endpoint_url=host:9")
    assert "s3.endpoint_url" in said("s3.endpoint_url=https://me:pw@host")
    assert "data.source 's3://no name/x': Parameter validation failed" in said("data.source=s3://no name/x")
    point(monkeypatch, "http://127.0.0.1:9", AWS_MAX_ATTEMPTS="many")
    assert "AWS_MAX_ATTEMPTS = 'many'" in said()
    point(monkeypatch, "http://127.0.0.1:9", AWS_PROFILE="absent")
    assert "AWS_PROFILE (s3.profile) = 'absent'" in said()
    point(monkeypatch, "nonsense")
    assert "AWS_ENDPOINT_URL (s3.endpoint_url) = 'nonsense'" in said()


@pytest.mark.parametrize(
    "wrong",
    [
        ("InvalidAccessKeyId", "GET", "refuses the credentials (InvalidAccessKeyId"),
        ("SignatureDoesNotMatch", "GET", "refuses the credentials"),
        ("ExpiredToken", "GET", "refuses the credentials"),
        ("AccessDenied", "GET", "these credentials have no permission for it (AccessDenied"),
        ("AccessDenied", "HEAD", "it may be listed, not read: these credentials have no permission"),
    ],
)
def test_wrong_credentials_are_one_line(s3, server, monkeypatch, capfd, wrong):
    code, method, words = wrong
    put(s3, "in/a.png")
    proxy = Proxy(server, lambda asked, *_: Fault(status=403, code=code) if asked == method else None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        line = one_line(capfd, *PLAN)
        assert line.startswith("error: data.source 's3://photos/in") and words in line
        assert len(proxy.requests) < 5  # not asked again and again


def test_a_server_that_is_down_is_no_wrong_config(s3, server, monkeypatch, capfd):
    put(s3, "in/a.png", "in/b.png")
    overloaded = Fault(status=503, code="SlowDown")
    for healthy in (0, 1):  # requests: of the check before the listing, and of the listing
        left = iter([None] * healthy)
        proxy = Proxy(server, lambda *_, left=left: next(left, overloaded))
        with proxy.serve() as endpoint:
            point(monkeypatch, endpoint, AWS_MAX_ATTEMPTS="1")
            assert one_line(capfd, *PLAN, code=1).startswith("error: data.source 's3://photos/in")
            with pytest.raises(ConnectionError, match="data.source 's3://photos/in/': SlowDown: as injected") as caught:
                list(Bucket.at("s3://photos/in").list((".png",)))
            assert diagnose(caught.value).transient
    point(monkeypatch, "http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    assert "Could not connect to the endpoint URL" in one_line(capfd, *PLAN, code=1)


def test_no_credentials_are_one_line(s3, monkeypatch, capfd):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "no credentials" in one_line(capfd, *PLAN)


def test_one_object_that_may_not_be_read_is_a_bad_image_and_not_the_end(s3, server, monkeypatch, tmp_path):
    put(s3, "a.png", "b.png", "c.png")
    proxy = Proxy(server, lambda _, path, __: Fault(status=403, code="AccessDenied") if "b.png" in path else None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        found = tally(ingested(tmp_path / "out", "s3://photos"))
    assert (found.images, found.rejected) == (2, 1) and "no permission" in found.reasons[0]


# --- a bad network ----------------------------------------------------------------------------------------------------


def ingested(output: Path, source: str):
    """What ingest's tasks do, without Ray around them."""
    config = IngestStageConfig(data=DataConfig(source=source, image_size=32), limits=IngestConfig())
    work = Work(open_source(config.data), config, str(output))
    _, blocks = write_blocks(work.source.list(), f"{output}/blocks", files_per_block=16)
    return [decode_block(block, work) for block in range(blocks)]


def tally(tallies):
    first, *others = tallies
    for other in others:
        first.add(other)
    return first


def tables(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(output.glob("table/*.parquet"))}


@pytest.mark.parametrize("seed", [0, 1])
def test_ingest_through_500s_slow_cut_and_changed_bodies_gives_the_same_bytes(s3, server, monkeypatch, tmp_path, seed):
    from skimage import data

    photograph = Path(data.__file__).parent / "astronaut.png"
    from PIL import Image

    with Image.open(photograph) as image:
        for number in range(40):
            crop = image.crop((number * 8, number * 7, number * 8 + 120, number * 7 + 100))
            put(s3, f"{number:02d}.jpg", body=saved(crop, "JPEG"))
    plain = tally(ingested(tmp_path / "plain", "s3://photos"))
    chance = random.Random(seed)
    kinds = [
        lambda: Fault(status=500),
        lambda: Fault(status=503, code="SlowDown"),
        lambda: Fault(cut_at=0.0),
        lambda: Fault(cut_at=chance.uniform(0.1, 0.9)),
        lambda: Fault(flip=True),
        lambda: Fault(pause_s=0.3),
    ]

    def fault(method: str, path: str, asked: int) -> Fault | None:
        if "jpg" not in path:  # the listing: no checksum protects it, so no flips
            return Fault(status=500) if asked < 2 else None
        return chance.choice(kinds)() if asked < 3 and chance.random() < 0.6 else None

    proxy = Proxy(server, fault)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        monkeypatch.setattr("components.sources.s3.PAUSE_S", 0.01)
        found = tally(ingested(tmp_path / "faults", "s3://photos"))
    assert sum(proxy.faults.values()) > 20 and {"cut", "flip", "InternalError"} <= proxy.faults.keys()
    assert (found.images, found.rejected) == (plain.images, plain.rejected) == (40, 0)
    assert tables(tmp_path / "faults") == tables(tmp_path / "plain")


def test_a_body_that_is_never_whole_ends_in_a_connection_error_after_so_many_tries(s3, server, monkeypatch):
    put(s3, "a.png")
    proxy = Proxy(server, lambda method, path, _: Fault(cut_at=0.5) if method == "GET" and "a.png" in path else None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint, AWS_MAX_ATTEMPTS="3")
        monkeypatch.setattr("components.sources.s3.PAUSE_S", 0.01)
        source = source_of("s3://photos")
        with pytest.raises(ConnectionError, match="no whole body in 3 tries"):
            source.read("a.png")
        assert proxy.faults["cut"] == 3


def test_a_server_whose_etag_is_no_md5_is_believed_the_second_time(s3, server, monkeypatch):
    put(s3, "a.png")

    proxy = Proxy(server, lambda method, path, _: Fault(flip=True) if method == "GET" and "a.png" in path else None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        buckets._client.cache_clear()
        monkeypatch.setattr("components.sources.s3.PAUSE_S", 0.01)
        assert source_of("s3://photos").read("a.png") == PNG[:-1] + bytes([PNG[-1] ^ 1])
        assert proxy.faults["flip"] == 2
    buckets._client.cache_clear()


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_environment_goes_before_the_config_and_no_secret_is_passed_on(monkeypatch):
    point(monkeypatch, "http://from-environment:9", AWS_SESSION_TOKEN="token-of-the-tests")
    monkeypatch.delenv("AWS_REGION")
    buckets.use(S3Settings(endpoint_url="http://from-config:9", region="eu-west-3", max_attempts=5))
    passed = stage_environment()
    assert passed["AWS_ENDPOINT_URL"] == "http://from-environment:9"
    assert passed["AWS_DEFAULT_REGION"] == "eu-west-3" and passed["AWS_MAX_ATTEMPTS"] == "5"
    assert not set(passed) & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
    assert not {"secret-of-the-tests", "token-of-the-tests", "key"} & set(passed.values())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://more-special:9")
    assert buckets._settings().endpoint == "http://more-special:9"


def test_an_endpoint_and_a_region_of_a_profile_hold_for_both_clients(s3, server, monkeypatch, tmp_path):
    (tmp_path / "config").write_text(f"[profile mine]\nendpoint_url = {server}\nregion = eu-west-3\n")
    point(monkeypatch, "", AWS_REGION="", AWS_PROFILE="mine", AWS_CONFIG_FILE=str(tmp_path / "config"))
    put(s3, "a.png")
    assert [item.path for item in source_of("s3://photos").list()] == ["a.png"]
    store = buckets.filesystem("photos")
    assert store.region == "eu-west-3" and store.get_file_info("photos/a.png").size == len(PNG)


# --- manifests --------------------------------------------------------------------------------------------------------


def manifest(rows: list[dict], suffix: str, folder: Path) -> bytes:
    """The rows as one of the three kinds."""
    file = folder / f"list{suffix}"
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return file.read_bytes()
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_manifest_in_a_bucket(s3, tmp_path, suffix):
    s3.create_bucket(Bucket="other")
    s3.put_object(Bucket="other", Key="far/x.png", Body=PNG)
    put(s3, "in/a.png", "in/b/1.png", "in/m.png", "in/unlisted.png")
    rows = [
        {"uri": "b/1.png", "label": "cat", "mask": "m.png", "split": "test"},
        {"uri": "s3://other/far/x.png", "label": "dog", "mask": None, "split": None},
        {"uri": "a.png", "label": None, "mask": None, "split": None},
        {"uri": "missing.png", "label": None, "mask": None, "split": None},
    ]
    s3.put_object(Bucket="photos", Key=f"in/list{suffix}", Body=manifest(rows, suffix, tmp_path))
    source = source_of(f"s3://photos/in/list{suffix}")
    assert isinstance(source, ManifestSource)
    listed = {item.path: item for item in source.list()}
    assert list(listed) == ["a.png", "b/1.png", "missing.png", "s3://other/far/x.png"]
    assert listed["b/1.png"].targets == Targets(label="cat", mask="m.png", split="val")
    assert listed["missing.png"].size == 0
    assert source.read("s3://other/far/x.png") == source.read("b/1.png") == source.read("m.png") == PNG
    assert source.uri("a.png") == "s3://photos/in/a.png" and source.uri("s3://other/a") == "s3://other/a"
    before = source.digest()
    put(s3, "in/m.png", body=PNG + b"1")
    assert source.digest() != before
    found = tally(ingested(tmp_path / "out", f"s3://photos/in/list{suffix}"))
    assert (found.images, found.mask, found.rejected) == (2, 0, 2)  # the mask, in colour now, is none


def test_a_local_manifest_of_objects_and_what_it_costs(s3, server, monkeypatch, tmp_path):
    names = [f"{number:05d}.png" for number in range(110)]
    monkeypatch.setattr("components.sources.s3.PAGE", 50)
    put(s3, *names, *(f"zz/{number}.png" for number in range(9)), body=b"x")
    lines = ["uri", *(f"s3://photos/{name}" for name in names)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    proxy = Proxy(server, lambda *_: None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        listed = list(source_of(tmp_path / "list.csv").list())
        assert len(listed) == 110 and all(item.size == 1 for item in listed)
        assert len(proxy.requests) <= 4  # pages, not one request an object
        proxy.requests.clear()
        (tmp_path / "few.csv").write_text("uri\ns3://photos/00000.png\ns3://photos/zz/7.png\ns3://photos/no.png")
        assert [item.size for item in source_of(tmp_path / "few.csv").list()] == [1, 0, 1]
        assert len(proxy.requests) < 8


def test_a_manifest_in_a_bucket_names_nothing_outside_it(s3):
    for uri, allowed in {"/etc/hosts": "or s3://BUCKET/KEY", "../a.png": "a path below 's3://photos/in'"}.items():
        put(s3, "in/list.csv", body=f"uri\n{uri}\n".encode())
        with pytest.raises(ValueError, match=f"'s3://photos/in/list.csv', line 2: uri = '{uri}'.*{allowed}"):
            list(source_of("s3://photos/in/list.csv").list())
    with pytest.raises(ValueError, match="there is no such object"):
        source_of("s3://photos/in/none.csv")


def test_a_slow_listing_is_waited_for(s3, server, monkeypatch):
    put(s3, "a.png")
    proxy = Proxy(server, lambda *_: Fault(pause_s=0.5))
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        began = time.monotonic()
        assert len(list(source_of("s3://photos").list())) == 1
        assert time.monotonic() - began > 0.5


# --- encode, decode and going on from a tokenizer, all in buckets -----------------------------------------------------


def test_a_tokenizer_images_and_tokens_in_buckets(s3, tmp_path, capfd):
    from components.train.recipes import build_base_objective
    from model import AlitTokenizer
    from model.starter import STARTER

    upload(s3, STARTER, "photos", "model/")
    put(s3, "in/a.png", "in/b.png")
    put(s3, "in/c.png", body=b"no image")
    paths = ("--model", "s3://photos/model", "--input", "s3://photos/in", "--output", "s3://photos/tokens")
    assert main(["encode", *paths, "--tokens", "8"]) == 0
    assert "2 images, 1 rejected" in capfd.readouterr().out
    archive = ("--model", "s3://photos/model", "--input", "s3://photos/tokens", "--output", str(tmp_path / "back"))
    assert main(["decode", *archive]) == 0
    assert len(list((tmp_path / "back").glob("*.png"))) == 2
    capfd.readouterr()
    line = one_line(capfd, "encode", "--model", "s3://photos/none", *paths[2:], "--tokens", "8")
    assert "--model 's3://photos/none': no tokenizer there" in line
    config = AlitTokenizer.load(STARTER).config.base
    stage = BaseStageConfig(
        image_size=64, base=config, objective=BaseObjectiveConfig(), train=TrainConfig(steps=1, batch_size=2)
    )
    ours, starter = (build_base_objective(stage, {}, start) for start in ("s3://photos/model", "starter"))
    assert all((a == b).all() for a, b in zip(ours.base.parameters(), starter.base.parameters(), strict=True))
