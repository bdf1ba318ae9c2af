"""Objectives: what they minimise, whom they move, and that they can be minimised on real photographs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, SMALL_CONFIGS, build, seeded

from model.base import build_base
from model.config import BaseObjectiveConfig, DistillConfig, HaltingConfig
from model.discriminator import PatchDiscriminator
from model.finetune import FinetuneObjective
from model.losses import adaptive_weight, hinge_discriminator, hinge_generator, lecam_penalty, r1_penalty
from model.objectives import BaseObjective, DistillObjective, Turn, train_only
from model.recipes import FinetuneConfig, PerceptualConfig

# With the local start, latents tell images apart from the first step on, and few steps are enough.
QUICK = {"budgets": (8, 16), "init": "local", "latent_dim": 16}
SMALL_GAN = FinetuneConfig(discriminator_channels=8, discriminator_layers=2)


def moved(objective: torch.nn.Module) -> set[str]:
    """Names of the parameters that have a gradient, zero or not."""
    return {name for name, p in objective.named_parameters() if p.grad is not None}


def finite_and_alive(objective: torch.nn.Module, names: set[str]) -> None:
    for name, p in objective.named_parameters():
        if name in names:
            assert torch.isfinite(p.grad).all(), name
            # The keys' bias shifts all logits of a softmax alike: its gradient is 0 up to rounding.
            assert p.grad.abs().max() > 0 or name.endswith("k.bias"), name


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_distillation_reaches_every_trainable_parameter_and_no_frozen_one(photographs, name):
    config = SMALL_CONFIGS[name]
    if config.halting.enabled:  # random weights reconstruct nothing so well: let chance alone decide
        config = replace(config, halting=HaltingConfig(True, 1e-6 if config.base.kind == "vqgan" else 10.0))
    objective = DistillObjective(build(config).train(), DistillConfig(pixel_weight=0.1))
    train_only(objective, objective.trainable())
    objective(photographs(4, (32, 32)), seeded()).total.backward()
    assert moved(objective) == set(objective.trainable())
    finite_and_alive(objective, set(objective.trainable()))
    assert not any("base." in name for name in objective.trainable())
    assert ("tokenizer.encoder.mask_token" in objective.trainable()) == config.halting.enabled


@pytest.mark.parametrize("halting", [False, True])
def test_a_single_rollout_leaves_no_trainable_parameter_without_gradient(photographs, halting):
    config = replace(SMALL, budgets=SMALL.budgets[-1:], halting=HaltingConfig(halting))
    objective = DistillObjective(build(config).train(), DistillConfig())
    train_only(objective, objective.trainable())
    objective(photographs(2, (32, 32)), seeded()).total.backward()
    assert moved(objective) == set(objective.trainable())


@pytest.mark.parametrize("name", ["vqgan", "continuous", "vae"])
@pytest.mark.parametrize("kind", ["per_rollout", "shared"])
def test_each_player_moves_its_own_parameters_alone(photographs, name, kind):
    config = replace(SMALL_GAN, discriminators=kind, sampled_rollouts=None, r1_weight=0.1, lecam_weight=0.1)
    objective = FinetuneObjective(build(SMALL_CONFIGS[name]).train(), config)
    model, discriminator = objective.trainable("model"), objective.trainable("discriminator")
    assert not set(model) & set(discriminator)
    assert ("tokenizer.base.codebook.weight" in model) is False
    assert len({n.split(".")[1] for n in discriminator}) == (1 if kind == "shared" else 4)
    train_only(objective, model | discriminator)
    images = photographs(4, (32, 32))

    loss = objective(images, seeded())
    loss.total.backward()
    assert moved(objective) == set(model)
    finite_and_alive(objective, set(model))
    objective.zero_grad(set_to_none=True)
    objective(images, seeded(), Turn("discriminator", made=loss.made)).total.backward()
    assert moved(objective) == set(discriminator)
    assert all(p.requires_grad for p in discriminator.values())


def test_the_discriminators_turn_takes_what_the_model_made_or_makes_it_anew(photographs):
    objective = FinetuneObjective(build(SMALL).train(), replace(SMALL_GAN, sampled_rollouts=2))
    images = photographs(4, (32, 32))
    made = objective(images, seeded()).made
    assert len(made) == 2 and not any(image.requires_grad for image in made.values())
    given = objective(images, seeded(), Turn("discriminator", made=made))
    anew = objective(images, seeded(), Turn("discriminator"))
    assert given.total.item() == pytest.approx(anew.total.item(), rel=1e-4)
    assert {t.num_tokens for t in given.terms} == {objective.tokenizer.budgets[k] for k in made}


def test_the_schedule_of_the_two_players():
    config = replace(SMALL_GAN, adversarial_weights=((10, 0.2), (20, 0.8)), discriminator_warm_up=4)
    objective = FinetuneObjective(build(SMALL), config)
    assert [config.adversarial_weight(step) for step in (0, 9, 10, 19, 20, 99)] == [0, 0, 0.2, 0.2, 0.8, 0.8]
    assert [objective.players(step) for step in (0, 5)] == [("model",)] * 2
    assert [objective.players(step) for step in (6, 10, 99)] == [("model", "discriminator")] * 3
    assert FinetuneObjective(build(SMALL), replace(SMALL_GAN, adversarial_weights=())).players(99) == ("model",)
    with pytest.raises(ValueError, match="adversarial_weights"):
        FinetuneConfig(adversarial_weights=((5, 0.2), (5, 0.8)))


def test_before_the_schedule_the_discriminator_has_no_part_in_the_loss(photographs):
    config = replace(SMALL_GAN, adversarial_weights=((10, 0.8),), sampled_rollouts=None)
    objective = FinetuneObjective(build(SMALL).train(), config)
    images = photographs(2, (32, 32))
    names = [{term.name for term in objective(images, seeded(), Turn(step=step)).terms} for step in (9, 10)]
    assert names[0] == {"pixel", "quantizer"}
    assert names[1] == {"pixel", "quantizer", "adversarial", "adaptive"}


def test_sampled_rollouts_run_no_further_than_needed(photographs):
    tokenizer = build(SMALL).train()
    ran = []
    tokenizer.encoder.register_forward_hook(lambda *_: ran.append("rollout"))
    tokenizer.decoder.register_forward_hook(lambda *_: ran.append("decode"))
    objective = DistillObjective(tokenizer, DistillConfig(sampled_rollouts=2))
    seen = set()
    for seed in range(12):
        ran.clear()
        loss = objective(photographs(1, (32, 32)), seeded(seed))
        chosen = sorted({tokenizer.budgets.index(term.num_tokens) for term in loss.terms})
        assert len(chosen) == 2
        assert (ran.count("rollout"), ran.count("decode")) == (chosen[-1] + 1, 2)
        seen.update(chosen)
    assert seen == {0, 1, 2, 3}


def test_halting_in_training_decodes_for_its_decision_without_a_graph(photographs):
    config = replace(SMALL, halting=HaltingConfig(True, 1e-6))
    tokenizer = build(config).train()
    grids = []
    tokenizer.decoder.register_forward_hook(lambda _m, _i, output: grids.append(output.requires_grad))
    images = photographs(2, (32, 32))
    steps = tokenizer.rollout(images, halting_noise=seeded())
    for _ in range(4):
        last = next(steps)
    last.grid.sum().backward()
    assert grids == [False, False, False, True]
    assert tokenizer.encoder.mask_token.grad.abs().max() > 0


def test_label_smoothing_smooths(photographs):
    tokenizer, images = build(SMALL), photographs(2, (32, 32))
    step = next(tokenizer.rollout(images))
    plain = tokenizer.base.distance(step.grid, step.target)
    smooth = tokenizer.base.distance(step.grid, step.target, 0.1)
    log_probability = step.grid.log_softmax(-1)
    expected = 0.9 * plain - 0.1 * log_probability.mean(-1)
    assert torch.allclose(smooth, expected, atol=1e-5)
    assert not torch.allclose(smooth, plain, atol=1e-3)
    objective = DistillObjective(tokenizer, DistillConfig(label_smoothing=0.1))
    assert objective(images, seeded()).total != DistillObjective(tokenizer, DistillConfig())(images, seeded()).total
    with pytest.raises(ValueError, match="label_smoothing"):
        DistillObjective(build(SMALL_CONFIGS["vae"]), DistillConfig(label_smoothing=0.1))(images, seeded())


def test_rollout_weights(photographs):
    tokenizer, images = build(SMALL), photographs(2, (32, 32))
    loss = DistillObjective(tokenizer, DistillConfig())(images, seeded())
    values = {(term.name, term.num_tokens): term.value for term in loss.terms}
    total = sum(
        weight * values["token", n] + values["code", n] + values["quantizer", n]
        for weight, n in zip((2.5, 2.0, 1.5, 1.25), tokenizer.budgets, strict=True)
    )
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-6)


def overfit(step, number: int) -> tuple[float, float]:
    """The first and the last loss."""
    losses = [step() for _ in range(number)]
    return losses[0], losses[-1]


@pytest.mark.parametrize("name", ["vqgan", "vae"])
def test_distillation_overfits_one_batch(photographs, name):
    tokenizer, images = build(replace(SMALL_CONFIGS[name], **QUICK)).train(), photographs(4, (32, 32))
    objective = DistillObjective(tokenizer, DistillConfig())
    train_only(objective, objective.trainable())
    optimizer = torch.optim.AdamW(objective.trainable().values(), lr=3e-3)
    generator = seeded()

    def step() -> float:
        optimizer.zero_grad()
        loss = objective(images, generator)
        loss.total.backward()
        optimizer.step()
        tokens = [term.value.item() for term in loss.terms if term.name == "token"]
        return sum(tokens) / len(tokens)

    first, last = overfit(step, 80)
    print(f"{name}: token loss {first:.3f} -> {last:.3f}")
    assert last < 0.5 * first


def test_finetuning_overfits_one_batch_with_its_discriminator(photographs):
    tokenizer = build(replace(SMALL_CONFIGS["continuous"], **QUICK)).train()
    images = photographs(4, (32, 32))
    objective = FinetuneObjective(tokenizer, replace(SMALL_GAN, adversarial_weights=((0, 0.1),)))
    players = {player: objective.trainable(player) for player in ("model", "discriminator")}
    train_only(objective, players["model"] | players["discriminator"])
    optimizers = {
        "model": torch.optim.AdamW(players["model"].values(), lr=3e-3),
        "discriminator": torch.optim.AdamW(players["discriminator"].values(), lr=2e-4),
    }
    generator = seeded()
    judged = []

    def step() -> float:
        made = None
        for player in objective.players(0):
            optimizers[player].zero_grad()
            loss = objective(images, generator, Turn(player, made=made))
            loss.total.backward()
            optimizers[player].step()
            made = loss.made
            values = {term.name: term.value.item() for term in loss.terms}
            if player == "model":
                pixel = values["pixel"]
            else:
                judged.append(values["logits_real"] - values["logits_fake"])
        return pixel

    first, last = overfit(step, 120)
    print(f"pixel loss {first:.3f} -> {last:.3f}, real over fake {judged[0]:.3f} -> {judged[-1]:.3f}")
    assert last < 0.5 * first
    assert judged[-1] > judged[0] + 0.2  # the discriminator learns in the same steps


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
def test_the_base_overfits_one_batch(photographs, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = BaseObjective(build_base(SMALL_CONFIGS[kind].base), BaseObjectiveConfig()).train()
    assert (objective.health is not None) == (kind == "vqgan")
    images, generator = photographs(4, (32, 32)), seeded()
    optimizer = torch.optim.AdamW(objective.trainable().values(), lr=3e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = objective(images, generator)
        loss.total.backward()
        optimizer.step()
        return loss.terms[0].value.item()

    first, last = overfit(step, 60)
    print(f"{kind}: l1 {first:.3f} -> {last:.3f}")
    assert last < 0.5 * first


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert hinge_generator(fake).item() == pytest.approx(1 / 3)
    means = torch.tensor(0.2), torch.tensor(-0.3)
    expected = ((real + 0.3).clamp(min=0) ** 2).mean() + ((0.2 - fake).clamp(min=0) ** 2).mean()
    assert lecam_penalty(real, fake, *means).item() == pytest.approx(expected.item())


def test_adaptive_weight_makes_gradients_equally_long():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    first, second = (layer * torch.tensor([3.0, 4.0])).sum(), 0.5 * layer.sum()
    weight = adaptive_weight(first, second, layer)
    assert weight.item() == pytest.approx(5 / (0.5 * 2**0.5 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(first, second, layer, lambda g: 2 * g).item() == pytest.approx(weight.item(), rel=1e-3)
    assert adaptive_weight(1e9 * first, second, layer).item() == 1e4


def test_r1_penalty_is_the_squared_gradient(photographs):
    images = photographs(2, (32, 32)).requires_grad_(True)
    slope = torch.linspace(-1, 1, images[0].numel()).view(images[0].shape)
    logits = (images * slope).sum((1, 2, 3)).view(2, 1, 1, 1)
    assert r1_penalty(logits, images).item() == pytest.approx(0.5 * slope.square().sum().item(), rel=1e-5)


def test_r1_flattens_the_discriminator(photographs):
    images = photographs(4, (32, 32))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        discriminator = PatchDiscriminator(8, 2)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    penalties = []
    for _ in range(20):
        leaf = images.clone().requires_grad_(True)
        penalty = r1_penalty(discriminator(leaf), leaf)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.5 * penalties[0]


def test_lecam_follows_the_logits(photographs):
    config = replace(SMALL_GAN, lecam_weight=1.0, sampled_rollouts=None, discriminators="shared")
    objective = FinetuneObjective(build(SMALL).train(), config)
    images = photographs(2, (32, 32))
    loss = objective(images, seeded(), Turn("discriminator"))
    assert objective.lecam_means.abs().sum() > 0
    assert "lecam" in {term.name for term in loss.terms}
    objective.eval()
    before = objective.lecam_means.clone()
    objective(images, seeded(), Turn("discriminator"))
    assert torch.equal(before, objective.lecam_means)


def test_finetuning_without_gradients_can_be_evaluated(photographs):
    objective = FinetuneObjective(build(SMALL), SMALL_GAN)
    with torch.no_grad():
        assert torch.isfinite(objective(photographs(2, (32, 32)), seeded()).total)


def test_configs_name_what_is_wrong():
    with pytest.raises(ValueError, match="perceptual.weights"):
        PerceptualConfig("lpips")
    with pytest.raises(ValueError, match="sampled_rollouts"):
        FinetuneConfig(sampled_rollouts=0)


def test_pixel_term_is_the_mean_absolute_error(photographs):
    objective = FinetuneObjective(build(SMALL), replace(SMALL_GAN, adversarial_weights=(), sampled_rollouts=None))
    images = photographs(2, (32, 32))
    loss = objective(images, seeded())
    for term in loss.terms:
        if term.name == "pixel":
            made = loss.made[objective.tokenizer.budgets.index(term.num_tokens)]
            assert term.value.item() == pytest.approx(F.l1_loss(made, images).item(), rel=1e-6)
