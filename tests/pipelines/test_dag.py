"""The graph: what is refused, what the keys depend on, what a plan says."""

import dataclasses
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from components.artifacts import Draft, Manifest, read_manifest
from components.config import ClusterSize
from components.store import remove
from pipelines.cluster import DemandError, check_demand, fits, grown, largest_node
from pipelines.config import load_config
from pipelines.dag import Demand, Pipeline, Stage, plan
from pipelines.train import ingest_stage


class Inner(BaseModel):
    size: int = 64


class Config(BaseModel):
    data: Inner = Inner()
    seed: int = 0


class Workers(BaseModel):
    workers: int = 1


def make(name: str, *needs: str, **changes: Any) -> Stage:
    facts: dict[str, Any] = {
        "run": "nowhere:nothing",
        "produces": "ImageSet",
        "config": Config(),
        "needs": {need.replace(".", "_"): need for need in needs},
    }
    return Stage(name, **{**facts, **changes})


def diamond(**changes: dict[str, Any]) -> Pipeline:
    needs: dict[str, tuple[str, ...]] = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
    return Pipeline("diamond", tuple(make(name, *needs[name], **changes.get(name, {})) for name in needs))


def commit(pipeline: Pipeline, workspace: str, *names: str, files: str = "", unreadable: int = 0, **seen: str) -> None:
    """Make the named stages' artifacts stand, as the runner would."""
    keys = pipeline.keys()
    for name in names:
        stage = pipeline[name]
        draft = Draft(workspace, name, keys[name])
        draft.commit(
            Manifest(
                schema="image_set",
                version=1,
                stage=name,
                key=keys[name],
                inputs={argument: keys[need] for argument, need in stage.needs.items()},
                config=stage.config.model_dump(mode="json"),
                counts={"unreadable": unreadable},
                code=stage.version,
                fingerprint={**stage.fingerprint, **seen},
                files=files,
            ),
            replaces=read_manifest(draft.final),
        )


def reasons(pipeline: Pipeline, workspace: str, force: tuple[str, ...] = ()) -> dict[str, str]:
    return {p.stage.name: p.reason for p in plan(pipeline, workspace, force) if p.state == "run"}


class TestValidation:
    def test_cycle(self) -> None:
        with pytest.raises(ValueError, match=r"cycle .*b -> .*c|cycle .*c -> .*b"):
            Pipeline("p", (make("a"), make("b", "a", "c"), make("c", "b")))

    def test_itself(self) -> None:
        with pytest.raises(ValueError, match="cycle a -> a"):
            Pipeline("p", (make("a", "a"),))

    def test_missing_input(self) -> None:
        with pytest.raises(ValueError, match="stage 'b' reads 'x' from 'x'"):
            Pipeline("p", (make("a"), make("b", "x")))

    def test_name_twice(self) -> None:
        with pytest.raises(ValueError, match="two stages are named 'a'"):
            Pipeline("p", (make("a"), make("a")))

    @pytest.mark.parametrize("name", ["", "A", "../x", ".drafts", "a/b", "logs", "scratch", "end", "a..b"])
    def test_bad_name(self, name: str) -> None:
        with pytest.raises(ValueError, match="can't be named"):
            Pipeline("p", (make(name),))

    def test_dotted_name(self) -> None:
        assert Pipeline("p", (make("select.depth_1"),)).names == ["select.depth_1"]

    def test_unknown_stage(self) -> None:
        with pytest.raises(ValueError, match="no stage 'z'"):
            diamond().until("z")


class TestGraph:
    def test_order(self) -> None:
        order = [stage.name for stage in diamond().order()]
        assert order[0] == "a" and order[-1] == "d"

    def test_order_of_reversed(self) -> None:
        backwards = Pipeline("p", tuple(reversed(diamond().stages)))
        assert [stage.name for stage in backwards.order()][0] == "a"
        assert backwards.keys() == diamond().keys()

    def test_until(self) -> None:
        assert set(diamond().until("b").names) == {"a", "b"}
        assert diamond().until("b").keys()["b"] == diamond().keys()["b"]

    def test_mermaid(self) -> None:
        text = Pipeline("p", (make("ingest"), make("select.depth", "ingest"))).mermaid()
        assert text.startswith("flowchart LR\n")
        assert 'select__depth["select.depth<br/>ImageSet"]' in text
        assert "ingest -- ingest --> select__depth" in text


class TestKeys:
    def test_form(self) -> None:
        for key in diamond().keys().values():
            assert len(key) == 16 and int(key, 16) >= 0

    def test_stable(self) -> None:
        """A key written down: an accidental change of how keys are made would run every workspace anew."""
        assert make("a").key({}) == "8d97d95be0088fb0"

    @given(
        change=st.sampled_from(
            ["config", "version", "fingerprint", "resources", "demand", "headline", "run", "nothing"]
        ),
        where=st.sampled_from("abcd"),
        value=st.integers(min_value=1, max_value=10**6),
    )
    def test_changes_iff(self, change: str, where: str, value: int) -> None:
        """A key changes if and only if config, version or fingerprint changes, there or upstream."""
        changes: dict[str, Any] = {
            "config": {"config": Config(data=Inner(size=64 + value))},
            "version": {"version": f"1.{value}"},
            "fingerprint": {"fingerprint": {"listing": value}},
            "resources": {"resources": Workers(workers=value)},
            "demand": {"demand": Demand(cpus=value)},
            "headline": {"headline": (str(value),)},
            "run": {"run": f"module{value}:function"},
            "nothing": {},
        }
        before, after = diamond().keys(), diamond(**{where: changes[change]}).keys()
        downstream = {"a": "abcd", "b": "bd", "c": "cd", "d": "d"}[where]
        expected = set(downstream) if change in {"config", "version", "fingerprint"} else set()
        assert {name for name in before if before[name] != after[name]} == expected

    @given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans() | st.none()))
    def test_order_of_facts_does_not_matter(self, facts: dict[str, Any]) -> None:
        backwards = dict(reversed(facts.items()))
        assert make("a", fingerprint=facts).key({}) == make("a", fingerprint=backwards).key({})

    def test_swapped_inputs_differ(self) -> None:
        assert make("a").key({"x": "1", "y": "2"}) != make("a").key({"x": "2", "y": "1"})


class TestPlan:
    def test_first_run(self, tmp_path: Any) -> None:
        assert reasons(diamond(), str(tmp_path)) == dict.fromkeys("abcd", "first run")

    def test_all_stand(self, tmp_path: Any) -> None:
        commit(diamond(), str(tmp_path), *"abcd")
        assert reasons(diamond(), str(tmp_path)) == {}
        assert all(p.manifest is not None for p in plan(diamond(), str(tmp_path)))

    def test_what_could_not_be_read_is_tried_again(self, tmp_path: Any) -> None:
        commit(diamond(), str(tmp_path), *"abcd")
        commit(diamond(), str(tmp_path), "a", unreadable=2)
        assert reasons(diamond(), str(tmp_path)) == {"a": "2 of its inputs could not be read"}

    def test_config(self, tmp_path: Any) -> None:
        commit(diamond(), str(tmp_path), *"abcd")
        changed = diamond(b={"config": Config(data=Inner(size=32))})
        assert reasons(changed, str(tmp_path)) == {"b": "config data.size: 64 -> 32", "d": "input b changed (b)"}

    def test_version_and_source(self, tmp_path: Any) -> None:
        commit(diamond(), str(tmp_path), *"abcd")
        changed = diamond(d={"version": "2"}, b={"fingerprint": {"listing": "x"}})
        told = reasons(changed, str(tmp_path))
        assert told == {"b": "source changed", "d": "code version 1 -> 2; input b changed (b)"}

    def test_what_was_made_of_another_source_than_planned_does_not_stand(self, tmp_path: Any) -> None:
        pipeline = diamond(a={"fingerprint": {"listing": "planned"}})
        commit(pipeline, str(tmp_path), *"bcd")
        commit(pipeline, str(tmp_path), "a", listing="with one more")
        assert reasons(pipeline, str(tmp_path)) == {"a": "source changed"}
        remove(str(tmp_path / "a"))
        commit(pipeline, str(tmp_path), "a", listing="planned")
        assert reasons(pipeline, str(tmp_path)) == {}

    def test_compares_with_the_newest(self, tmp_path: Any) -> None:
        for seed in (1, 2):
            commit(diamond(a={"config": Config(seed=seed)}), str(tmp_path), "a")
            time.sleep(0.02)
        assert reasons(diamond(a={"config": Config(seed=3)}), str(tmp_path))["a"] == "config seed: 2 -> 3"
        assert "a" not in reasons(diamond(a={"config": Config(seed=1)}), str(tmp_path))

    def test_input_added(self, tmp_path: Any) -> None:
        commit(diamond(), str(tmp_path), *"abcd")
        more = Pipeline("p", (*(s for s in diamond().stages if s.name != "c"), make("c", "a", "b")))
        assert reasons(more, str(tmp_path))["c"] == "input b changed (b)"

    def test_forced_alone(self, tmp_path: Any) -> None:
        commit(diamond(), str(tmp_path), *"abcd")
        assert reasons(diamond(), str(tmp_path), ("a",)) == {"a": "forced"}

    def test_tables_follow_the_files_of_their_images(self, tmp_path: Any) -> None:
        """One listing may be ingested into other files, after another history: what has the old ones runs again."""
        kinds = {"images": "ImageSet", "model": "Tokenizer", "codes": "CodeBook", "scores": "ScoreTable"}
        needs = {"images": (), "model": ("images",), "codes": ("images", "model"), "scores": ("codes",)}
        pipeline = Pipeline("p", tuple(make(name, *needs[name], produces=kind) for name, kind in kinds.items()))
        commit(pipeline, str(tmp_path), *kinds)
        assert reasons(pipeline, str(tmp_path)) == {}
        expected = {"codes": "images is made again", "scores": "codes is made again"}
        assert reasons(pipeline, str(tmp_path), ("images",)) == {"images": "forced", **expected}
        remove(str(tmp_path / "images"))
        commit(pipeline, str(tmp_path), "images", files="others")
        assert reasons(pipeline, str(tmp_path)) == expected
        remove(str(tmp_path / "codes"))
        commit(pipeline, str(tmp_path), "codes", files="others")
        assert reasons(pipeline, str(tmp_path)) == {"scores": "codes is made again"}

    def test_force_unknown(self, tmp_path: Any) -> None:
        with pytest.raises(ValueError, match="no stage 'z'"):
            plan(diamond(), str(tmp_path), ("z",))

    def test_removed_upstream_runs_alone(self, tmp_path: Any) -> None:
        commit(diamond(), str(tmp_path), *"abcd")
        remove(str(tmp_path / "a"))
        assert reasons(diamond(), str(tmp_path)) == {"a": "first run"}

    def test_draft_does_not_count(self, tmp_path: Any) -> None:
        Draft(str(tmp_path), "a", diamond().keys()["a"])
        (tmp_path / "a" / diamond().keys()["a"]).mkdir(parents=True)
        assert reasons(diamond(), str(tmp_path))["a"] == "first run"

    def test_many_reasons_are_cut(self, tmp_path: Any) -> None:
        class Wide(BaseModel):
            a: int = 0
            b: int = 0
            c: int = 0
            d: int = 0

        old, new = make("s", config=Wide()), make("s", config=Wide(a=1, b=1, c=1, d=1))
        commit(Pipeline("p", (old,)), str(tmp_path), "s")
        assert reasons(Pipeline("p", (new,)), str(tmp_path))["s"].endswith("config c: 0 -> 1; and 1 more")


class TestDemand:
    def test_says_what_would_fit(self) -> None:
        demand = Demand(cpus=4, data_cpus=1, workers=4, setting="training")
        with pytest.raises(DemandError) as caught:
            check_demand([make("distill", demand=demand)], {"CPU": 2.0})
        assert str(caught.value) == (
            "distill wants 4 workers x 1 CPU + 1 for Ray Data = 5 CPUs, the cluster has 2: "
            "set training.workers=1 or training.cpus_per_worker=0.25, or use a bigger cluster "
            "(if it grows by itself, ray.grows_to says how far)"
        )

    def test_exactly_fits(self) -> None:
        check_demand([make("a", demand=Demand(cpus=1, data_cpus=1))], {"CPU": 2.0})
        check_demand([make("a", demand=Demand(cpus=0.1 + 0.2, data_cpus=1))], {"CPU": 1.3})

    def test_nothing_left_for_ray_data(self) -> None:
        with pytest.raises(DemandError, match="1 for Ray Data"):
            check_demand([make("a", demand=Demand(cpus=2, data_cpus=1))], {"CPU": 2.0})

    def test_memory_is_counted_in_gib(self) -> None:
        demand = Demand(memory_gb=8, workers=4, unit="actor", setting="inference")
        check_demand([make("a", demand=demand)], {"memory": 8 * 2**30})
        with pytest.raises(DemandError) as caught:
            check_demand([make("score", demand=demand)], {"memory": 5 * 2**30})
        assert str(caught.value).startswith(
            "score wants 4 actors x 2 GiB = 8 GiB, the cluster has 5: "
            "set inference.actors=2 or inference.memory_mb_per_actor=1280, or use"
        )
        assert not fits(demand, [demand], {"memory": 15 * 2**30})

    def test_a_cluster_that_grows_is_as_large_as_it_will_be(self) -> None:
        have = grown({"CPU": 2.0, "memory": 2**30}, ClusterSize(cpus=16, memory_gb=0.5))
        assert have == {"CPU": 16.0, "GPU": 0.0, "memory": 2**30}
        check_demand([make("a", demand=Demand(cpus=15, data_cpus=1))], have)

    def test_a_worker_fits_on_one_node(self) -> None:
        nodes = [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 4 * 2**30}}] * 2
        nodes += [{"Alive": False, "Resources": {"CPU": 64.0, "memory": 64 * 2**30}}]
        now = {"CPU": 4.0, "memory": 8 * 2**30}
        largest = largest_node(nodes, now, now)
        fitting = Demand(cpus=4, memory_gb=8, workers=2)
        check_demand([make("a", demand=fitting)], now, largest)
        wide = Demand(cpus=3, memory_gb=6, unit="actor", setting="inference")
        with pytest.raises(DemandError) as caught:
            check_demand([make("score", demand=wide)], now, largest)
        assert str(caught.value).splitlines() == [
            "score wants 3 CPU for one actor, no node has more than 2: set inference.cpus_per_actor=2, "
            "or use larger nodes",
            "score wants 6 GiB for one actor, no node has more than 4: set inference.memory_mb_per_actor=4096, "
            "or use larger nodes",
        ]
        more = grown(now, ClusterSize(cpus=8, memory_gb=16))  # a node of 4 CPU and 8 GiB may come
        check_demand([make("score", demand=wide)], more, largest_node(nodes, now, more))

    def test_a_task_of_ingest_fits_on_one_node(self) -> None:
        ingest = ingest_stage(load_config("demo", ["ingest.memory_mb_per_task=6144"]))
        check_demand([ingest], {"CPU": 2.0, "memory": 6 * 2**30})
        with pytest.raises(DemandError, match=r"ingest wants 6 GiB, .* set ingest.memory_mb_per_task=4096"):
            check_demand([ingest], {"CPU": 2.0, "memory": 4 * 2**30})

    def test_gpus_and_every_stage(self) -> None:
        stages = [make("a", demand=Demand(gpus=1)), make("b", demand=Demand(cpus=99)), make("c")]
        with pytest.raises(DemandError, match=r"(?s)a wants 1 GPU, the cluster has 0.*b wants 99 CPU"):
            check_demand(stages, {"CPU": 2.0})

    def test_two_that_fit_alone_do_not_run_together(self) -> None:
        training = Demand(cpus=1, data_cpus=1)
        assert fits(training, [], {"CPU": 2.0})
        assert not fits(training, [training], {"CPU": 2.0})
        assert fits(training, [training], {"CPU": 3.0})
        assert fits(Demand(), [training], {"CPU": 2.0})


def test_stage_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make("a").name = "b"  # type: ignore[misc]
