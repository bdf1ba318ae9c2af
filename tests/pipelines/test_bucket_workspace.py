"""A workspace in a bucket: artifacts, checkpoints and the lock, against a real S3 API, also through a bad network."""

import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from components import buckets, store
from components.artifacts import DRAFTS, MANIFEST, Draft, ImageSet, Manifest, read_manifest
from components.store import filesystem, join, read_bytes
from components.train.checkpoints import Checkpoints
from pipelines import bucket_lock
from pipelines.bucket_lock import BucketLock, LockUnreachable
from pipelines.config import ConfigError
from pipelines.lock import STALE_S, Holder, WorkspaceHeld, hold, holder_of
from tests.s3_server import Fault, Proxy, client_of, point, reset, s3_server

ROOT = Path(__file__).parents[2]
SPACE = "s3://work/alit/demo"
MANIFEST_OF = {"schema": "image_set", "version": 2, "stage": "ingest", "inputs": {}, "config": {}, "counts": {}}


@pytest.fixture(scope="module")
def server():
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(server, monkeypatch):
    """A client of the server, which this process uses too; bucket ``work`` is empty."""
    point(monkeypatch, server)
    reset(server)
    client = client_of(server)
    client.create_bucket(Bucket="work")
    return client


def keys(client) -> list[str]:
    """Every object but the empty ones that stand for folders."""
    found = client.list_objects_v2(Bucket="work").get("Contents", [])
    return [item["Key"] for item in found if not item["Key"].endswith("/")]


def manifest(key: str) -> Manifest:
    return Manifest(key=key, **MANIFEST_OF)


def draft_of(files: dict[str, bytes], key: str = "k1", workspace: str = SPACE) -> Draft:
    draft = Draft(workspace, "ingest", key)
    for name, data in files.items():
        store.write_bytes(join(draft.uri, name), data)
    return draft


# --- artifacts --------------------------------------------------------------------------------------------------------


def test_a_draft_becomes_an_artifact_and_leaves_nothing(s3):
    draft = draft_of({"table/part-000000.parquet": b"rows", "big": random.Random(0).randbytes(6 << 20)})
    assert read_manifest(draft.final) is None
    assert draft.commit(manifest("k1")) == f"{SPACE}/ingest/k1"
    found = ImageSet.open(f"{SPACE}/ingest/k1")
    assert found.key == "k1" and read_bytes(join(found.uri, "table/part-000000.parquet")) == b"rows"
    assert keys(s3) == [f"alit/demo/ingest/k1/{name}" for name in (MANIFEST, "big", "table/part-000000.parquet")]


def test_large_objects_are_copied_in_parts(s3, server, monkeypatch):
    body = random.Random(1).randbytes(12 << 20)
    draft = draft_of({"big": body})
    monkeypatch.setattr(buckets, "PART_BYTES", 5 << 20)
    proxy = Proxy(server, lambda *_: None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        draft.commit(manifest("k1"))
    ranges = [headers for _, _, headers in proxy.requests if any("source-range" in name.lower() for name in headers)]
    assert len(ranges) == 3
    assert read_bytes(f"{SPACE}/ingest/k1/big") == body


@pytest.mark.parametrize("until", [0, 1, 2, 3])
def test_a_commit_that_breaks_off_anywhere_leaves_no_artifact_and_can_be_done_again(s3, server, monkeypatch, until):
    """An older artifact stands there, as after --force; its manifest goes before anything else of it does."""
    old = manifest("k1")
    draft_of({"a": b"old", "b": b"old", "only-old": b"old"}).commit(old)
    draft = draft_of({"a": b"new", "b": b"new"})
    copies: list[str] = []

    def fault(method: str, path: str, _: int) -> Fault | None:
        if method == "PUT" and "/ingest/k1/" in path and not path.endswith("/"):
            copies.append(path)
            if len(copies) > until:
                return Fault(status=403, code="AccessDenied")
        return None

    proxy = Proxy(server, fault)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        if until < 3:
            with pytest.raises(OSError, match="permission"):
                draft.commit(manifest("k1"), replaces=old)
        else:
            draft.commit(manifest("k1"), replaces=old)
    point(monkeypatch, server)
    if until < 3:
        assert read_manifest(f"{SPACE}/ingest/k1") is None
        draft_of({"a": b"new", "b": b"new"}).commit(manifest("k1"))
    assert [key for key in keys(s3) if "/ingest/" in key] == [f"alit/demo/ingest/k1/{n}" for n in ("a", MANIFEST, "b")]
    assert read_bytes(f"{SPACE}/ingest/k1/a") == b"new"


@pytest.mark.parametrize("place", ["bucket", "disk"])
def test_a_run_that_comes_late_leaves_what_another_has_finished(s3, tmp_path, place):
    """It was suspended before its commit; the one that took over swept its draft away and finished the same key."""
    space = SPACE if place == "bucket" else str(tmp_path)
    old = manifest("k1")
    draft_of({"a": b"old"}, workspace=space).commit(old)
    late, swept = (draft_of({"a": b"late"}, key, space) for key in ("k1", "k2"))
    store.remove(join(space, DRAFTS))
    winner = replace(manifest("k1"), seconds=7.0)
    draft_of({"a": b"winner"}, workspace=space).commit(winner, replaces=old)
    for one in (late, draft_of({"a": b"later"}, workspace=space)):
        assert one.commit(manifest("k1"), replaces=old) == late.final
        assert read_manifest(late.final) == winner and read_bytes(join(late.final, "a")) == b"winner"
        assert not store.exists(one.uri)
    with pytest.raises(FileNotFoundError, match="the draft is gone"):
        swept.commit(manifest("k2"))
    assert read_manifest(swept.final) is None


def test_a_run_that_loses_the_workspace_while_it_commits_finishes_nothing(s3):
    checks = iter([None, RuntimeError("lost")])

    def check() -> None:
        if error := next(checks):
            assert read_bytes(f"{SPACE}/ingest/k1/a") == b"1"  # only the manifest is missing
            raise error

    with pytest.raises(RuntimeError, match="lost"):
        draft_of({"a": b"1"}).commit(manifest("k1"), check=check)
    assert read_manifest(f"{SPACE}/ingest/k1") is None


def test_artifacts_through_a_bad_network_are_the_same(s3, server, monkeypatch):
    chance = random.Random(3)
    kinds = [lambda: Fault(status=500), lambda: Fault(status=503, code="SlowDown"), lambda: Fault(pause_s=0.2)]
    bodies = [lambda: Fault(cut_at=0.5), lambda: Fault(cut_at=0.0)]

    def fault(method: str, path: str, asked: int) -> Fault | None:
        choices = kinds + (bodies if method == "GET" else [])
        return chance.choice(choices)() if asked < 2 and chance.random() < 0.5 else None

    table = pa.table({"n": list(range(200_000))})
    proxy = Proxy(server, fault)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        draft = draft_of({f"file-{number}": bytes([number]) * 300_000 for number in range(6)})
        store.write_table(join(draft.uri, "table"), table)
        draft.commit(manifest("k1"))
        found = ImageSet.open(f"{SPACE}/ingest/k1")
        assert store.read_table(found.table_uri) == table
        for number in range(6):
            assert read_bytes(join(found.uri, f"file-{number}")) == bytes([number]) * 300_000
    assert sum(proxy.faults.values()) > 10, proxy.faults


def test_folders_come_and_go_whole(s3, tmp_path):
    with store.filled_folder(f"{SPACE}/model") as folder:
        Path(folder, "weights").write_bytes(b"w")
        Path(folder, "more").mkdir()
        Path(folder, "more/x").write_bytes(b"x")
    with store.local_folder(f"{SPACE}/model") as folder:
        assert Path(folder, "more/x").read_bytes() == b"x" and Path(folder, "weights").read_bytes() == b"w"
    with pytest.raises(RuntimeError), store.filled_folder(f"{SPACE}/other") as folder:
        Path(folder, "half").write_bytes(b"")
        raise RuntimeError
    assert not store.exists(f"{SPACE}/other")


def test_checkpoints(s3):
    told: list[str] = []
    kept = Checkpoints(f"{SPACE}/scratch/distill/k1/checkpoints", keep=2, say=told.append)
    for step in range(1, 5):
        kept.save({"w": torch.full((300, 300), float(step))}, step=step, score=1.0 / step)
    kept.close()
    assert [mark.step for mark in kept.standing()] == [3, 4]
    newest = kept.newest()
    assert newest is not None and float(newest["w"][0, 0]) == 4.0 and not told
    s3.put_object(Bucket="work", Key="alit/demo/scratch/distill/k1/checkpoints/step-00000004/state.pt", Body=b"torn")
    newest = Checkpoints(kept.uri, keep=2, say=told.append).newest()
    assert newest is not None and float(newest["w"][0, 0]) == 3.0 and "step 4 is damaged" in told[0]


def test_a_checkpoint_comes_in_few_requests_and_stays_when_it_cannot_be_read(s3, server, monkeypatch):
    uri, told = f"{SPACE}/scratch/distill/k1/checkpoints", []
    kept = Checkpoints(uri, keep=2, say=told.append)
    kept.save({f"w{number}": torch.full((100,), float(number)) for number in range(200)}, step=1, score=None)
    kept.close()
    proxy = Proxy(server, lambda *_: None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint, AWS_MAX_ATTEMPTS="2")
        newest = Checkpoints(uri, keep=2, say=told.append).newest()
        assert newest is not None and float(newest["w199"][0]) == 199.0
        assert len([path for method, path, _ in proxy.requests if method == "GET" and "state.pt" in path]) < 5
        proxy.fault = lambda method, path, _: Fault(status=503) if method == "GET" and "state.pt" in path else None
        with pytest.raises(OSError, match="state.pt"):
            Checkpoints(uri, keep=2, say=told.append).newest()
    assert not told and [mark.step for mark in Checkpoints(uri, keep=2, say=told.append).standing()] == [1]


# --- the lock ---------------------------------------------------------------------------------------------------------


def elsewhere(run_id: str = "other") -> Holder:
    return replace(Holder.me(run_id), host="another", place="another")


def test_a_workspace_is_held_by_one_run(s3):
    with hold(SPACE, "one") as lock:
        holder = holder_of(SPACE)
        assert holder is not None and holder.run_id == "one" and lock.held()
        with pytest.raises(WorkspaceHeld, match=f"workspace {SPACE} is in use by run one"), hold(SPACE, "two"):
            pass
    assert holder_of(SPACE) is None and keys(s3) == []
    with hold("s3://work", "at the top"):
        assert keys(s3) == [".lock"]


def test_of_many_that_try_at_once_one_wins(s3):
    locks = [BucketLock(SPACE, elsewhere(f"run-{number}")) for number in range(8)]
    barrier, winners = threading.Barrier(8), []

    def take(lock: BucketLock) -> None:
        barrier.wait()
        if lock.take() is None:
            winners.append(lock)

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lock.held() for lock in locks) == 1
    assert [lock for lock in winners if lock.held()]


def test_the_lock_of_a_silent_run_is_taken_and_it_learns_of_it(s3, monkeypatch):
    first, second = BucketLock(SPACE, elsewhere("first")), BucketLock(SPACE, Holder.me("second"))
    assert first.take() is None
    assert second.take() == first.me
    first.beat()
    assert first.held() and second.take() == first.me
    monkeypatch.setattr(bucket_lock, "STALE_S", 0.0)
    assert second.take() is None and second.previous == first.me
    first.beat()
    assert second.held() and not first.held()
    first.release()
    assert second.held()
    second.release()
    assert keys(s3) == []


def test_a_killed_run_on_this_machine_is_dead_at_once(s3):
    code = "import os\nfrom pipelines.lock import hold\nwith hold('s3://work/alit/demo', 'killed'):\n    os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    assert len(keys(s3)) == 1 and holder_of(SPACE) is None
    with hold(SPACE, "next") as lock:
        assert lock.previous is not None and lock.previous.run_id == "killed"


def test_a_heartbeat_whose_answer_was_lost_does_not_lose_the_lock(s3, server, monkeypatch):
    lock = BucketLock(SPACE, Holder.me("me"))
    assert lock.take() is None
    body = json.loads(s3.get_object(Bucket="work", Key="alit/demo/.lock")["Body"].read())
    s3.put_object(Bucket="work", Key="alit/demo/.lock", Body=json.dumps(body))  # another ETag, the same holder
    lock.beat()
    assert lock.held()
    before = s3.head_object(Bucket="work", Key="alit/demo/.lock")["LastModified"]
    time.sleep(1.1)
    lock.beat()
    assert s3.head_object(Bucket="work", Key="alit/demo/.lock")["LastModified"] > before


@pytest.mark.parametrize("left_by", ["", "dead"])
def test_a_run_whose_taking_was_done_but_not_answered_does_not_refuse_itself(s3, server, monkeypatch, left_by):
    if left_by:
        assert BucketLock(SPACE, replace(Holder.me(left_by), birth="1")).take() is None
    proxy = Proxy(server, lambda method, _, asked: Fault(500, late=True) if (method, asked) == ("PUT", 0) else None)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        with hold(SPACE, "me") as lock:
            assert lock.held() and proxy.faults["InternalError"] == 1
            assert (lock.previous.run_id if lock.previous else "") == left_by
    assert keys(s3) == []


def test_a_heart_goes_on_after_credentials_that_ran_out(s3, server, monkeypatch):
    beats = [threading.Event() for _ in range(4)]

    def fault(method: str, _: str, asked: int) -> Fault | None:
        if method != "PUT":
            return None
        beats[min(asked, 3)].set()
        return Fault(status=400, code="ExpiredToken") if asked in (1, 2) else None

    monkeypatch.setattr("pipelines.lock.HEARTBEAT_S", 0.02)
    proxy = Proxy(server, fault)
    with proxy.serve() as endpoint:
        point(monkeypatch, endpoint)
        with hold(SPACE, "me") as lock:
            assert all(beat.wait(20) for beat in beats)
            assert lock.held() and proxy.faults["ExpiredToken"] == 2


def test_what_keeps_a_lock_from_being_taken(s3, server, monkeypatch):
    refusals = {
        "AccessDenied": (403, ConfigError, "these credentials have no permission"),
        "InvalidAccessKeyId": (403, ConfigError, "refuses the credentials"),
        "NotImplemented": (501, LockUnreachable, "needs a server that does conditional writes"),
    }
    for code, (status, kind, said) in refusals.items():
        proxy = Proxy(server, lambda method, *_, s=status, c=code: Fault(status=s, code=c) if method == "PUT" else None)
        with proxy.serve() as endpoint:
            point(monkeypatch, endpoint, AWS_MAX_ATTEMPTS="1")
            with pytest.raises(kind, match=f"workspace '{SPACE}'.*{said}"), hold(SPACE, "me"):
                pass
    point(monkeypatch, server)
    s3.put_object(Bucket="work", Key="alit/demo/.lock", Body=b"{}")
    with pytest.raises(ValueError, match="is not a lock this software wrote"), hold(SPACE, "me"):
        pass


def test_the_limit_of_silence_is_above_what_a_slow_network_takes():
    assert STALE_S >= 60


# --- a run's beginning ------------------------------------------------------------------------------------------------


def test_drafts_of_killed_runs_are_swept_by_the_next(s3):
    from pipelines.runner import _clean_up_after_the_dead

    draft_of({"half": b"1"})
    with hold(SPACE, "next") as lock:
        _clean_up_after_the_dead(SPACE, lock, None)
    assert not [key for key in keys(s3) if DRAFTS in key]


def test_a_run_without_an_mlflow_server_or_a_bucket_is_refused_in_one_line(s3, monkeypatch, capfd):
    from pipelines.cli import main

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["run", "demo", "--set", f"workspace={SPACE}"]) == 2
    assert "mlflow.uri: not set" in capfd.readouterr().err
    assert main(["status", "demo", "--set", "workspace=s3://absent/w"]) == 2
    assert "workspace 's3://absent/w': there is no such bucket" in capfd.readouterr().err
    assert main(["plan", "demo", "--set", f"workspace={SPACE}", "--set", "training.from=s3://work/none"]) == 2
    assert "training.from = 's3://work/none'" in capfd.readouterr().err
    assert filesystem(SPACE)[1] == "work/alit/demo"
