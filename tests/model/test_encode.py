"""encode and decode: each image alone, whatever the batch; nothing computed that isn't asked for."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import SMALL_CONFIGS, build

from model import AlitTokenizer, Best, FixedTokens, LengthHead, MeanTokens, PredictedThreshold, Threshold, Within
from model.config import HaltingConfig
from model.metrics import METRICS
from model.recipes import LengthHeadConfig
from model.tokens import TokenBatch


@dataclass
class Counted:
    """How many images went through each part."""

    base_encode: int = 0
    rollouts: int = 0
    decoder: int = 0
    base_decode: int = 0
    quantizer: int = 0


def count(tokenizer: AlitTokenizer) -> Counted:
    counted = Counted()

    def hook(name: str) -> Callable:
        def add(_module, inputs, _output) -> None:
            setattr(counted, name, getattr(counted, name) + len(inputs[0]))

        return add

    tokenizer.base.encoder.register_forward_hook(hook("base_encode"))
    tokenizer.encoder.register_forward_hook(hook("rollouts"))
    tokenizer.decoder.register_forward_hook(hook("decoder"))
    tokenizer.base.decoder.register_forward_hook(hook("base_decode"))
    tokenizer.quantizer.register_forward_hook(hook("quantizer"))
    return counted


@torch.no_grad()
def values_at_every_budget(tokenizer: AlitTokenizer, images: torch.Tensor, metric: str = "l1") -> np.ndarray:
    columns = [METRICS[metric](images, step.images.clamp(0, 1)) for step in tokenizer.rollout(images)]
    return torch.stack(columns, dim=1).numpy()


def spread_threshold(values: np.ndarray) -> float:
    """A threshold that images meet at different budgets."""
    best = np.minimum.accumulate(values, axis=1)
    return float(np.median(best[:, 1]))


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_a_batch_equals_each_image_alone(small, photographs, name):
    tokenizer, images = small(name), photographs(6, (32, 32))
    values = values_at_every_budget(tokenizer, images)
    rules = [Threshold("l1", max=spread_threshold(values)), Within("l1", 1.02), Best("l1"), FixedTokens(8)]
    for rule in rules:
        together = tokenizer.encode(images, rule)
        alone = [tokenizer.encode(image[None], rule) for image in images]
        expected = rule.select(values, tokenizer.budgets)
        assert together.num_tokens.tolist() == expected.num_tokens.tolist()
        for whole, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole, single[0])
        backwards = tokenizer.encode(images.flip(0), rule)
        for whole, single in zip(together, reversed(list(backwards)), strict=True):
            np.testing.assert_array_equal(whole, single)
    counts = tokenizer.encode(images, rules[0]).num_tokens
    assert len(set(counts.tolist())) > 1, "the threshold should part the images"


@pytest.mark.parametrize("name", SMALL_CONFIGS)
@torch.no_grad()
def test_tokens_are_those_of_the_rollout_and_decode_to_its_images(small, photographs, name):
    tokenizer, images = small(name), photographs(3, (32, 32))
    for step in tokenizer.rollout(images):
        tokens = tokenizer.encode(images, step.num_tokens)
        found = step.latents if step.codes is None else step.codes
        np.testing.assert_array_equal(np.stack(tokens.to_numpy()), found.numpy())
        decoded = tokenizer.decode(tokens)
        assert decoded.shape == images.shape
        # The straight-through sum in the rollout rounds once more than looking the entries up.
        assert (decoded - step.images.clamp(0, 1)).abs().max() < 1e-5


def test_mixed_lengths_decode_in_order(small, photographs):
    tokenizer, images = small(), photographs(6, (32, 32))
    rule = Threshold("l1", max=spread_threshold(values_at_every_budget(tokenizer, images)))
    tokens = tokenizer.encode(images, rule)
    assert len(set(tokens.num_tokens.tolist())) > 1
    counted = count(tokenizer)
    decoded = tokenizer.decode(tokens)
    assert counted.decoder == counted.base_decode == 6
    for single, image in zip(tokens, decoded, strict=True):
        alone = tokenizer.decode(TokenBatch.from_numpy([single], tokenizer.config.codebook_size))
        assert torch.equal(alone[0], image)


@pytest.mark.parametrize(("met", "rollouts", "decoded"), [(1, 1, 1), (3, 3, 3), (None, 4, 3)])
def test_early_stop_runs_fewer_rollouts(small, photographs, met, rollouts, decoded):
    """Met at the first budget: one rollout. Never met: the last budget's value can't matter, so it isn't decoded."""
    tokenizer, images = small(), photographs(1, (32, 32))
    values = values_at_every_budget(tokenizer, images)[0]
    lowest = np.minimum.accumulate(values)
    if met is not None:  # any metric will do that is met there for the first time
        limit = values[met - 1] if met == 1 else (values[met - 1] + lowest[met - 2]) / 2
        if met > 1 and values[met - 1] >= lowest[met - 2]:
            pytest.skip("random weights: this budget is no better than those before")
    else:
        limit = 0.0
    counted = count(tokenizer)
    tokenizer.encode(images, Threshold("l1", max=float(limit)))
    assert counted == Counted(1, rollouts, decoded, decoded, rollouts)


def test_images_that_meet_the_rule_leave_the_batch(small, photographs):
    tokenizer, images = small(), photographs(6, (32, 32))
    rule = Threshold("l1", max=spread_threshold(values_at_every_budget(tokenizer, images)))
    counted = count(tokenizer)
    tokens = tokenizer.encode(images, rule)
    rollouts = [tokenizer.budgets.index(n) + 1 for n in tokens.num_tokens]
    assert counted.rollouts == sum(rollouts)
    assert counted.base_decode == sum(min(n, 3) for n in rollouts)
    assert counted.base_encode == 6


@pytest.mark.parametrize("name", ["vqgan", "continuous", "vae"])
def test_a_fixed_count_decodes_nothing(small, photographs, name):
    tokenizer = small(name)
    counted = count(tokenizer)
    tokenizer.encode(photographs(2, (32, 32)), 8)
    assert counted == Counted(base_encode=2, rollouts=4, quantizer=2)


def test_halting_costs_the_decoder_passes_it_needs_and_no_pixels(small, photographs):
    tokenizer = small("halting")
    counted = count(tokenizer)
    tokenizer.encode(photographs(2, (32, 32)), 12)
    assert (counted.rollouts, counted.decoder, counted.base_decode) == (6, 4, 0)


def head_that_predicts(tokenizer: AlitTokenizer, values: list[float]) -> LengthHead:
    """A head that says ``values`` of every image but moves them by what it sees."""
    torch.manual_seed(0)
    head = LengthHead(LengthHeadConfig("l1", tokenizer.config.encoder_width, len(tokenizer.budgets), hidden=8)).eval()
    head.centre.copy_(torch.tensor(values))
    head.spread.fill_(0.02)
    return head


def test_a_predicted_length_decodes_nothing(small, photographs):
    tokenizer, images = small(), photographs(6, (32, 32))
    head = head_that_predicts(tokenizer, [0.4, 0.3, 0.2, 0.1])
    with torch.no_grad():
        predicted = head(next(tokenizer.rollout(images)).hidden).numpy()
    rule = PredictedThreshold(head, max=float(np.median(predicted[:, 1])))
    expected = rule.select(predicted, tokenizer.budgets)
    counted = count(tokenizer)
    tokens = tokenizer.encode(images, rule)
    assert tokens.num_tokens.tolist() == expected.num_tokens.tolist()
    assert len(set(tokens.num_tokens.tolist())) > 1
    assert counted.rollouts == sum(tokenizer.budgets.index(n) + 1 for n in tokens.num_tokens)
    assert (counted.decoder, counted.base_decode, counted.quantizer) == (0, 0, 6)
    for image, whole in zip(images, tokens, strict=True):
        np.testing.assert_array_equal(tokenizer.encode(image[None], rule)[0], whole)


def test_what_encode_refuses(small, photographs):
    tokenizer, images = small(), photographs(2, (32, 32))
    with pytest.raises(ValueError, match=r"num_tokens = 5.*\[4, 8, 12, 16\]"):
        tokenizer.encode(images, 5)
    with pytest.raises(ValueError, match="MeanTokens"):
        tokenizer.encode(images, MeanTokens("l1", 8))
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\]"):
        tokenizer.encode(images[..., :16], 4)
    assert len(tokenizer.encode(images[:0], 4)) == 0


def test_what_decode_refuses(small, photographs):
    tokenizer = small()
    with pytest.raises(ValueError, match="codebook_size None"):
        tokenizer.decode(small("continuous").encode(photographs(1, (32, 32)), 4))
    with pytest.raises(ValueError, match="allowed is 1 to 16"):
        tokenizer.decode(TokenBatch.from_numpy([np.zeros(17, dtype=np.int64)], 64))
    assert tokenizer.decode(TokenBatch.from_numpy([], 64)).shape == (0, 3, 32, 32)


def test_half_precision_latents_decode(small, photographs):
    tokenizer, images = small("continuous"), photographs(2, (32, 32))
    tokens = tokenizer.encode(images, 8)
    assert (tokenizer.decode(tokens.half()) - tokenizer.decode(tokens)).abs().max() < 1e-2


@pytest.mark.parametrize("name", SMALL_CONFIGS)
@torch.no_grad()
def test_bf16_autocast_stays_close(small, photographs, name):
    tokenizer, images = small(name), photographs(3, (32, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = [step.images.float() for step in tokenizer.rollout(images)]
        tokens = tokenizer.encode(images, Threshold("l1", max=0.2))
        decoded = tokenizer.decode(tokens)
    assert decoded.dtype == torch.float32
    for step, found in zip(tokenizer.rollout(images), half, strict=True):
        assert (step.images - found).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["vqgan", "vae"])
@torch.no_grad()
def test_halting_off_equals_the_model_without_it(photographs, name):
    images = photographs(2, (32, 32))
    plain = build(SMALL_CONFIGS[name])
    out_of_reach = HaltingConfig(enabled=True, threshold=1.1 if name == "vqgan" else 0.0)
    never = build(replace(SMALL_CONFIGS[name], halting=out_of_reach))
    for a, b in zip(plain.rollout(images), never.rollout(images), strict=True):
        assert torch.equal(a.hidden, b.hidden)
