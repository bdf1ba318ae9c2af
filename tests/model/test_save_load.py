"""A tokenizer on disk: safetensors, config, format version."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, SMALL_CONFIGS, build
from safetensors.torch import load_file

from model import SIZES, AlitConfig, AlitTokenizer
from model.tokenizer import FORMAT_VERSION


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_round_trip(photographs, tmp_path, name):
    tokenizer, images = build(SMALL_CONFIGS[name]), photographs(2, (32, 32))
    tokenizer.save(tmp_path / "new" / "folder")
    again = AlitTokenizer.load(tmp_path / "new" / "folder")
    assert again.config == tokenizer.config and not again.training
    for one, other in zip(tokenizer.encode(images, 8), again.encode(images, 8), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # convolutions of a loaded one are laid out anew
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "weights.safetensors"]


def test_loading_leaves_nothing_unfilled_and_draws_no_random_numbers(tmp_path):
    tokenizer = build(replace(SMALL, init="local"))
    tokenizer.save(tmp_path)
    before = torch.get_rng_state()
    again = AlitTokenizer.load(tmp_path)
    saved = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in again.state_dict().items())
    assert all(p.requires_grad for p in again.parameters())
    assert again.config.init == "local"
    AlitTokenizer.unfilled(SMALL)
    torch.rand(1)
    assert not torch.equal(before, torch.get_rng_state())


def test_a_newer_format_is_refused_by_name(tmp_path):
    build(SMALL).save(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(
        ValueError, match=rf"format_version {FORMAT_VERSION + 1} of 'alit-tokenizer'.*up to {FORMAT_VERSION}"
    ):
        AlitTokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**header, "format": "something"}))
    with pytest.raises(ValueError, match="format 'something'"):
        AlitTokenizer.load(tmp_path)


def test_configs_round_trip_as_json():
    for config in (*SIZES.values(), *SMALL_CONFIGS.values()):
        assert AlitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TypeError, match="surprise"):
        AlitConfig.from_dict({**SMALL.to_dict(), "surprise": 1})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": (30, 32)}, "image_size"),
        ({"budgets": (8, 4)}, "budgets"),
        ({"budgets": ()}, "budgets"),
        ({"encoder_heads": 5}, "encoder_width"),
        ({"encoder_width": 16}, "encoder_width"),
        ({"latent_dim": None}, "latent_dim"),
    ],
)
def test_impossible_configs_name_the_field(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **changes)
