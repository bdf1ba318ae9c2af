"""The main job with its source and its workspace in buckets, against a real S3 API that behaves as a busy one does."""

import re
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data

from components import buckets
from tests.integration.conftest import SMALL, alit, settings
from tests.s3_server import KEYS, Fault, Proxy, client_of, point, s3_server

pytestmark = pytest.mark.slow

SPACE = "s3://work/alit/demo"
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png")


def photographs(folder: Path, number: int) -> None:
    """Crops of real photographs."""
    folder.mkdir()
    for index in range(number):
        with Image.open(Path(data.__file__).parent / PHOTOGRAPHS[index % 3]) as image:
            left, top = 7 * index % (image.width - 120), 5 * index % (image.height - 110)
            image.crop((left, top, left + 120, top + 110)).convert("RGB").save(folder / f"{index:03d}.jpg")


def busy(method: str, path: str, asked: int) -> Fault | None:
    """A quarter of all first tries are refused, done and yet refused, cut in the middle, or slow: by their path."""
    refused = [Fault(status=503, code="SlowDown"), Fault(status=500), Fault(pause_s=0.3)]
    kinds = {"GET": [Fault(cut_at=0.5), *refused], "PUT": [Fault(status=500, late=True), *refused]}.get(method, refused)
    drawn = zlib.crc32(f"{method} {path}".encode()) % (4 * len(kinds))
    return kinds[drawn] if asked == 0 and drawn < len(kinds) else None


def test_source_and_workspace_in_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs(tmp_path / "photos", 60)
    with s3_server() as server, (proxy := Proxy(server, busy)).serve() as endpoint:
        client = client_of(server)
        for bucket in ("photos", "work"):
            client.create_bucket(Bucket=bucket)
        for file in (tmp_path / "photos").iterdir():
            client.put_object(Bucket="photos", Key=f"in/{file.name}", Body=file.read_bytes())
        client.put_object(Bucket="photos", Key="in/broken.jpg", Body=b"no image")
        point(monkeypatch, "", AWS_REGION="")  # credentials alone; the rest is the config's
        arguments = [
            "demo",
            *settings(
                *SMALL,
                f"workspace={SPACE}",
                "data.source=s3://photos/in",
                f"mlflow.uri=sqlite:///{tmp_path}/mlflow.db",
                f"s3.endpoint_url={endpoint}",
                "s3.region=us-east-1",
            ),
        ]
        first = alit("run", *arguments)
        assert first.code == 0, first.out + first.err
        stages = len(re.findall(r"^\S+ {2,}done ", first.out, re.MULTILINE))
        assert stages >= 8
        assert "images 60  rejected 1" in first.out
        assert sum(proxy.faults.values()) > 20 and proxy.faults.keys() == {"SlowDown", "InternalError", "cut"}
        assert KEYS["AWS_SECRET_ACCESS_KEY"] not in first.out + first.err

        again = alit("run", *arguments)
        assert again.code == 0 and again.out.count("reused") == stages, again.out + again.err

        point(monkeypatch, server)
        keys = [item["Key"] for item in client.list_objects_v2(Bucket="work")["Contents"]]
        assert len([key for key in keys if key.endswith("artifact.json")]) == stages
        assert not [key for key in keys if ".drafts/" in key and not key.endswith("/")]
        assert "alit/demo/.lock" not in keys

        model = "/".join(next(key for key in keys if re.search(r"/distill/\w+/weights", key)).split("/")[:-1])
        encode = ("encode", "--model", f"s3://work/{model}", "--input", "s3://photos/in", "--max-l1", "0.08")
        encoded = alit(*encode, "--output", "s3://work/encoded")
        assert encoded.code == 0 and "60 images, 1 rejected" in encoded.out, encoded.err
        counts = table(next(key for key in keys if "/select.reconstruction/" in key and "/table/" in key))
        assert pq.read_table("work/encoded/table", filesystem=buckets.filesystem("work"))["num_tokens"].to_pylist() == (
            counts["num_tokens"].to_pylist()
        )
        decode = ("decode", "--model", f"s3://work/{model}", "--input", "s3://work/encoded")
        decoded = alit(*decode, "--output", str(tmp_path / "back"))
        assert decoded.code == 0, decoded.err
        assert len(list((tmp_path / "back").glob("*.png"))) == 60

        client.put_object(Bucket="photos", Key="in/more.jpg", Body=(tmp_path / "photos/007.jpg").read_bytes())
        client.delete_object(Bucket="photos", Key="in/003.jpg")
        more = alit("run", *arguments, "--until", "ingest")
        assert "images 60  rejected 1  added 1  changed 0  removed 1" in more.out, more.out + more.err

        further = settings(f"training.from=s3://work/{model}", "training.workers=1")
        gone_on = alit("run", *arguments, *further, "--until", "distill")
        assert gone_on.code == 0, gone_on.out + gone_on.err
    assert not [folder for folder in tmp_path.iterdir() if folder.name.startswith(("s3", "work"))]


def table(key: str) -> "pq.Table":
    """The table whose first file is ``key``."""
    return pq.read_table(f"work/{key.rpartition('/')[0]}", filesystem=buckets.filesystem("work"))
