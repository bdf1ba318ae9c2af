"""The authors' checkpoints in every shape they come in, and back."""

import argparse
import json
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import SMALL_CONFIGS, SMALL_VQGAN, build, parity_folder
from safetensors.torch import save_file

from model import AlitTokenizer, load_official
from model.config import SIZES, AlitConfig, VAEConfig
from model.official import from_official, official_config, to_official

SMALL_ARGUMENTS = {
    "base_tokenizer": "vqgan",
    "base_config": {
        "ddconfig": {"ch": 8, "ch_mult": [1, 2, 2], "num_res_blocks": 1},
        "embed_dim": 16,
        "n_embed": 64,
    },
    "encoder_width": 48,
    "encoder_num_layers": 2,
    "encoder_num_heads": 4,
    "decoder_width": 48,
    "decoder_num_layers": 2,
    "decoder_num_heads": 4,
    "vq_codebook_size": 64,
    "vq_token_dim": 6,
    "num_init_latent_tokens": 4,
    "max_rollout_iters": 4,
    "img_size": 32,
    "patch_size": 4,
    "dynamic_halting": False,
    "run_name": "what has no effect is ignored",
}


@pytest.fixture
def arguments() -> dict:
    """The authors' arguments of a small model; their group norm has 32 groups always, ours is set after."""
    return dict(SMALL_ARGUMENTS)


@pytest.fixture(autouse=True)
def four_groups(monkeypatch):
    """Small convolutions can't have the authors' 32 groups."""
    make = SMALL_VQGAN.__class__
    for kind in (make, VAEConfig):
        monkeypatch.setattr("model.official." + kind.__name__, lambda kind=kind, **fields: kind(num_groups=4, **fields))


def official_small(name: str = "vqgan") -> AlitTokenizer:
    """A small tokenizer with the quirks of the authors' weights."""
    base = SMALL_CONFIGS[name].base
    quirks = {"shortcut": "residual"} if base.kind == "vqgan" else {"unscale": False}
    return build(replace(SMALL_CONFIGS[name], base=replace(base, symmetric=False, **quirks)))


@pytest.mark.parametrize("base", ["vqgan", "vae"])
def test_names_and_shapes_of_alit_small(base, monkeypatch):
    monkeypatch.undo()
    listed = json.loads((parity_folder() / f"keys_alit_small_{base}_quantized.json").read_text())
    with torch.device("meta"):
        state = to_official(AlitTokenizer(official_config({"base_tokenizer": base})))
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {key[0]: key[1] for key in listed}


@pytest.mark.parametrize(
    ("size", "base", "total"),
    [
        ("alit_tiny", "vqgan", 107.35),
        ("alit_tiny", "vae", 118.44),
        ("alit_small", "vqgan", 262.05),
        ("alit_small", "vae", 272.11),
        ("alit_base", "vqgan", 228.69),
        ("alit_base", "vae", 239.27),
        ("alit_semilarge", "vqgan", 463.59),
        ("alit_semilarge", "vae", 473.65),
    ],
)
def test_parameter_counts_of_the_paper(size, base, total):
    config = SIZES[size] if base == "vqgan" else replace(SIZES[size], base=VAEConfig())
    if base == "vqgan":
        config = replace(config, base=replace(config.base, shortcut="residual"))
    with torch.device("meta"):
        count = sum(p.numel() for p in AlitTokenizer(config).parameters())
    assert count / 1e6 == pytest.approx(total, abs=0.006)


@pytest.mark.parametrize("name", ["vqgan", "continuous", "wide latents", "vae"])
@torch.no_grad()
def test_there_and_back(photographs, name):
    tokenizer = official_small(name)
    state = to_official(tokenizer)
    assert ("quantize.embedding.weight" in state) == (tokenizer.config.codebook_size is not None)
    assert "pre_quantizer_mlp.weight" in state
    again = from_official(state, tokenizer.config)
    assert not again.training
    images = photographs(2, (32, 32))
    for ours, theirs in zip(tokenizer.rollout(images), again.rollout(images), strict=True):
        assert torch.equal(ours.images, theirs.images)


def checkpoint(tokenizer: AlitTokenizer) -> dict:
    """What the authors' training writes, finetuning's extra networks included."""
    state = to_official(tokenizer)
    gan = {
        "gan_losses.0.discriminator.main.0.weight": torch.zeros(4),
        "gan_losses.0.perceptual_loss.lin0": torch.ones(1),
    }
    other = {name: tensor + 1 for name, tensor in state.items()}
    args = argparse.Namespace(model="alit_small", lr=1e-3)
    return {"model": {**other, **gan}, "ema": {**state, **gan}, "optimizer": {"step": 3}, "epoch": 7, "args": args}


def test_pth_with_arguments_and_extra_networks(tmp_path, arguments):
    tokenizer = official_small()
    torch.save(checkpoint(tokenizer), tmp_path / "checkpoint-last.pth")
    loaded = load_official(tmp_path / "checkpoint-last.pth", arguments)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tokenizer.parameters(), strict=True))
    raw = load_official(tmp_path / "checkpoint-last.pth", arguments, weights="model")
    assert torch.equal(raw.encoder.positions, tokenizer.encoder.positions + 1)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_bare_state_dict(tmp_path, arguments, suffix):
    tokenizer = official_small()
    path = tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pth" else save_file)(to_official(tokenizer), path)
    loaded = load_official(path, arguments)
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded.decoder.positions, tokenizer.decoder.positions)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, arguments):
    class Harm:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="isn't loaded"):
        load_official(tmp_path / "evil.pth", arguments)
    torch.save({"model": {}, "args": Harm()}, tmp_path / "evil2.pth")
    with pytest.raises(ValueError, match="isn't loaded"):
        load_official(tmp_path / "evil2.pth", arguments)


def test_missing_unexpected_and_wrong_tensors_are_named():
    tokenizer = official_small()
    state = to_official(tokenizer)
    del state["latent_tokens"]
    state["surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing 1 tensors \(latent_tokens\); unexpected 1 tensors \(surprise\)"):
        from_official(state, tokenizer.config)
    wider = replace(tokenizer.config, encoder_width=96)
    with pytest.raises(ValueError, match=r"\[144\] and not \[288\].*no named config"):
        from_official(to_official(tokenizer), wider)


def test_a_wrong_size_says_which_would_fit(tmp_path, monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        shapes = to_official(AlitTokenizer(official_config({"encoder_width": 512, "decoder_width": 512})))
    tiny = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in shapes.items()}
    torch.save({"ema": tiny}, tmp_path / "tiny.pth")
    with pytest.raises(
        ValueError, match="width 512, 8 encoder layers, a vqgan base and quantized.*'alit_tiny' would fit"
    ):
        load_official(tmp_path / "tiny.pth", "alit_small")
    assert load_official(tmp_path / "tiny.pth", "alit_tiny").config.encoder_width == 512
    with pytest.raises(ValueError, match="alit_huge.*'alit_small'"):
        load_official(tmp_path / "tiny.pth", "alit_huge")
    with pytest.raises(ValueError, match="holds.*ema.*'model'"):
        load_official(tmp_path / "tiny.pth", "alit_tiny", weights="model")
    with pytest.raises(ValueError, match="missing .*base_tokenizer.vae"):
        load_official(tmp_path / "tiny.pth", "alit_tiny", base="vae")


def test_a_file_that_is_no_alit_checkpoint():
    with pytest.raises(ValueError, match="no ALIT checkpoint"):
        from_official({"weight": torch.zeros(1)}, AlitConfig())


def test_quirks_and_halting_come_in_as_config():
    vqgan, vae = official_config({}), official_config({"base_tokenizer": "vae", "dynamic_halting": True})
    assert (vqgan.base.shortcut, vqgan.base.symmetric) == ("residual", False)
    assert (vae.base.unscale, vae.base.symmetric) == (False, False)
    assert vqgan.halting.enabled and not vae.halting.enabled  # the authors' VAE variant never halts
    assert official_config({"quantize_latent": False, "factorize_latent": False}).latent_dim is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"vq_use_l2_norm": False}, "vq_use_l2_norm"),
        ({"patch_size": 8}, "patch_size"),
        ({"base_tokenizer": "dalle"}, "dalle"),
    ],
)
def test_arguments_without_support_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        official_config(wrong)
