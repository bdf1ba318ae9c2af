"""Equal to the authors' code, by the numbers recorded from it (folder: environment variable ALIT_PARITY)."""

import json
import re

import pytest
import torch
from conftest import Recorded, parity_folder
from safetensors.torch import load_file
from torch import Tensor

from model.base import convolution
from model.base.convolution import Conv3x3
from model.config import DistillConfig, HaltingConfig
from model.finetune import FinetuneObjective
from model.inference import prepare_for_inference
from model.objectives import DistillObjective, Turn, train_only
from model.official import from_official, load_official, official_config, official_name
from model.recipes import FinetuneConfig
from model.tokenizer import AlitTokenizer

FOLDERS = {
    "A": "A_vqgan_quantized",
    "B": "B_vqgan_continuous",
    "C": "C_vae_quantized",
    "E": "E_vqgan_halting",
}


def load(fixture: Recorded) -> AlitTokenizer:
    return load_official(fixture.folder / "state_dict.safetensors", fixture.config)


def differences(fixture: Recorded, tokenizer: AlitTokenizer, noise: dict) -> dict[str, float]:
    """The largest difference of each kind of output over all rollouts; for indices, the number that differ."""
    found: dict[str, float] = {}

    def compare(name: str, ours: Tensor, theirs: str | None = None) -> None:
        if (theirs or name) in fixture.outputs:
            recorded = fixture.outputs[theirs or name]
            off = (recorded != ours).sum() if not recorded.is_floating_point() else (recorded - ours).abs().max()
            kind = re.sub(r"_\d", "", name)
            found[kind] = max(found.get(kind, 0.0), float(off))

    images = fixture.images
    grid = tokenizer.base.encode(images, noise["posterior_noise"])
    compare("base_tokens", grid.features_BEhw)
    compare("gt_indices", grid.target)
    compare("patch_embed", tokenizer.encoder.patch_embed(images))
    for k, step in enumerate(tokenizer.rollout(images, **noise)):
        compare(f"x_latents_{k}", step.hidden)
        compare(f"latents_factorized_{k}", step.projected)
        compare(f"latents_quantized_{k}", step.latents)
        if step.codes is not None:
            compare(f"quant_indices_{k}", step.codes)
            compare(f"quantizer_loss_{k}", step.quantized.loss)
        compare(f"logits_{k}", step.grid)
        compare(f"argmax_ids_{k}", step.grid.argmax(-1))
        compare(f"decoded_code_{k}", tokenizer.base.code(step.grid))
        compare(f"image_soft_{k}", step.images[..., ::8, ::8], f"recon_soft_{k}_stride8")
        compare(f"image_{k}", step.images[..., ::8, ::8], f"recon_{k}_stride8")
        compare(f"image_soft_full_{k}", step.images[:1], f"recon_soft_{k}_full_img0")
        compare(f"image_full_{k}", step.images[:1], f"recon_{k}_full_img0")
        if f"drop_{k}" in fixture.outputs:
            drops = tokenizer.halted(step.grid, step.target, noise["halting_noise"][k])
            compare(f"halted_{k}", drops.to(torch.uint8), f"drop_{k}")
    return found


@pytest.mark.parametrize("prepared", [False, True], ids=["fresh", "prepared"])
@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_every_output_of_every_rollout(recorded, name, prepared, monkeypatch):
    fixture = recorded(FOLDERS[name])
    tokenizer = load(fixture)
    if prepared:
        monkeypatch.setattr(convolution, "LEAST_CHANNELS", 32)
        prepare_for_inference(tokenizer, "fp32")
    found = differences(fixture, tokenizer, fixture.noise)
    layers = [layer for layer in tokenizer.modules() if isinstance(layer, Conv3x3)]
    by_tiles = sum(layer.kernels_PCO is not None for layer in layers)
    assert by_tiles >= 20 if prepared else by_tiles == 0
    print(name, {kind: f"{value:.1e}" for kind, value in found.items()})
    assert {"x_latents", "decoded_code"} <= set(found)
    assert ("logits" in found) == (name != "C")
    assert ("quant_indices" in found) == (name != "B")
    assert ("halted" in found) == (name == "E")
    for kind, value in found.items():
        allowed = 1e-3 if kind.startswith("image") else 0 if "indices" in kind or "ids" in kind else 1e-4
        assert value <= allowed, kind
    assert found.get("halted", 0) == 0


@torch.no_grad()
def test_vae_mode_is_the_default(recorded):
    fixture = recorded(FOLDERS["C"])
    tokenizer = load(fixture)
    for k, step in enumerate(tokenizer.rollout(fixture.images)):
        assert torch.equal(step.codes.int(), fixture.outputs[f"mode_quant_indices_{k}"])
        assert (tokenizer.base.code(step.grid) - fixture.outputs[f"mode_decoded_code_{k}"]).abs().max() < 1e-4


@torch.no_grad()
def test_halting_drops_are_there_and_change_the_outcome(recorded):
    fixture = recorded(FOLDERS["E"])
    assert all(int(fixture.outputs[f"drop_{k}"].sum()) > 50 for k in range(8))
    without = official_config({**fixture.config, "dynamic_halting": False})
    assert without.halting == HaltingConfig(False, 0.55)
    tokenizer = from_official(load_file(fixture.folder / "state_dict.safetensors"), without)
    first, second, *_ = tokenizer.rollout(fixture.images)
    assert torch.allclose(first.hidden, fixture.outputs["x_latents_0"], atol=1e-4)
    assert (second.hidden - fixture.outputs["x_latents_1"]).abs().max() > 0.1


@pytest.mark.parametrize("name", FOLDERS)
def test_distillation_losses_gradients_and_step(recorded, monkeypatch, name):
    fixture = recorded(FOLDERS[name])
    expected = json.loads((parity_folder() / f"D_train_{name}" / "config.json").read_text())
    gradients = load_file(parity_folder() / f"D_train_{name}" / "outputs.safetensors")
    tokenizer = load(fixture).train()
    given_noise(monkeypatch, tokenizer, fixture)
    objective = DistillObjective(tokenizer, DistillConfig())
    parameters = objective.trainable()
    train_only(objective, parameters)
    loss = objective(fixture.images, torch.Generator())
    loss.total.backward()

    assert loss.total.item() == pytest.approx(expected["total_loss"], rel=1e-5)
    for k, parts in enumerate(expected["per_iteration"]):
        ours = {term.name: term.value.item() for term in loss.terms if term.num_tokens == tokenizer.budgets[k]}
        assert ours["quantizer"] == pytest.approx(parts.get("quantization_loss", 0.0), rel=1e-5, abs=1e-7)
        assert ours["token"] == pytest.approx(parts.get("nll_loss", parts["code_loss"]), rel=1e-5)
    norms, full = {}, 0
    for ours, parameter in tokenizer.named_parameters():
        if parameter.grad is not None:
            theirs = official_name(ours, tokenizer.config)
            norms[theirs] = parameter.grad.norm().item()
            if f"grad.{theirs}" in gradients:
                full += 1
                off = (parameter.grad - gradients[f"grad.{theirs}"]).abs().max()
                assert off <= 1e-5 * max(1.0, norms[theirs]), theirs
    assert norms.keys() == expected["grad_norm"].keys()
    assert full > 50
    for theirs, norm in expected["grad_norm"].items():
        assert norms[theirs] == pytest.approx(norm, rel=1e-4, abs=1e-6), theirs
    if "optimizer_step" in expected:
        one_step(parameters, expected["optimizer_step"], tokenizer)
        with torch.no_grad():
            after = objective(fixture.images, torch.Generator()).total.item()
        assert after == pytest.approx(expected["optimizer_step"]["total_loss_after_step"], rel=1e-3)


def one_step(parameters: dict[str, torch.nn.Parameter], expected: dict, tokenizer: AlitTokenizer) -> None:
    """The authors' AdamW step, vectors and biases not decayed (timm's grouping)."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 3.0)
    assert norm.item() == pytest.approx(expected["total_grad_norm_before_clip"], rel=1e-4)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step()
    for ours, p in parameters.items():
        theirs = official_name(ours.removeprefix("tokenizer."), tokenizer.config)
        assert (p - before[ours]).norm().item() == pytest.approx(expected["delta_norm"][theirs], rel=2e-3), theirs


def given_noise(monkeypatch, tokenizer: AlitTokenizer, fixture: Recorded) -> None:
    """Every rollout of ``tokenizer`` takes the numbers that the authors drew."""
    rollout = tokenizer.rollout
    monkeypatch.setattr(tokenizer, "rollout", lambda images, **_: rollout(images, **fixture.noise))


def gan_cases() -> list[dict]:
    return json.loads((parity_folder() / "F_gan_stage2" / "config.json").read_text())["cases"]


def seed_that_draws(rollout: int) -> torch.Generator:
    """A generator whose next draw of one rollout is this one."""
    for seed in range(1000):
        if int(torch.randperm(8, generator=torch.Generator().manual_seed(seed))[0]) == rollout:
            return torch.Generator().manual_seed(seed)
    raise AssertionError(rollout)


@pytest.mark.parametrize("number", range(5))
def test_finetuning_losses_and_gradients(recorded, number):
    fixture, case = recorded(FOLDERS["A"]), gan_cases()[number]
    rollout, logs, player = case["iteration"], case["logs"], ("model", "discriminator")[case["gan_optimizer_idx"]]
    tokenizer = load(fixture).train()
    config = FinetuneConfig(adversarial_weights=((0, case["gan_loss_weight"]),), discriminator_channels=4)
    objective = FinetuneObjective(tokenizer, config).train()
    weights = load_file(parity_folder() / "F_gan_stage2" / "gan_state_dict.safetensors")
    prefix = r"^gan_losses\.(\d)\.discriminator\.main\."
    names = {name: re.sub(prefix, r"\1.layers.", name) for name in weights}
    objective.discriminators.load_state_dict({names[name]: tensor for name, tensor in weights.items()})
    train_only(objective, objective.trainable("model") | objective.trainable("discriminator"))
    loss = objective(fixture.images, seed_that_draws(rollout), Turn(player))
    loss.total.backward()
    terms = {term.name: term.value.item() for term in loss.terms}

    if player == "model":
        assert loss.total.item() == pytest.approx(case["total_loss"], rel=1e-5)
        assert terms["pixel"] == pytest.approx(logs[f"train/rec_loss_{rollout}"], rel=1e-5)
        if case["gan_loss_weight"]:
            assert terms["adversarial"] == pytest.approx(logs[f"train/g_loss_{rollout}"], rel=1e-4)
            weight = terms["adaptive"] * case["gan_loss_weight"]
            assert weight == pytest.approx(logs[f"train/d_weight_{rollout}"], rel=1e-4)
        ours = {official_name(name, tokenizer.config): p.grad for name, p in tokenizer.named_parameters()}
        theirs = {name: norm for name, norm in case["grad_norm"].items() if not name.startswith("gan_losses")}
        assert all(p.grad is None for p in objective.discriminators.parameters())  # the authors move them here
    else:  # the authors add the quantizer's loss, though no parameter of it steps here
        quantizer = logs[f"quantization_loss_{rollout}"]
        assert loss.total.item() == pytest.approx(case["total_loss"] - quantizer, rel=1e-5)
        assert terms["logits_real"] == pytest.approx(logs[f"train/logits_real_{rollout}"], rel=1e-4)
        assert terms["logits_fake"] == pytest.approx(logs[f"train/logits_fake_{rollout}"], rel=1e-4)
        assert all(p.grad is None for p in tokenizer.parameters())
        back = {ours: theirs for theirs, ours in names.items()}
        ours = {back[name]: p.grad for name, p in objective.discriminators.named_parameters()}
        theirs = {name: norm for name, norm in case["grad_norm"].items() if name.startswith("gan_losses")}
    theirs = {name: norm for name, norm in theirs.items() if norm > 0}
    assert {name for name, gradient in ours.items() if gradient is not None and gradient.norm() > 0} == set(theirs)
    # The discriminator's gradients are small differences of large sums: real patches against reconstructed ones.
    absolute = 1e-6 if player == "model" else 2e-5
    for name, norm in theirs.items():
        assert ours[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=absolute), name
