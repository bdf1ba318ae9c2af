"""The checkpoints of the paper's own release in and out of our format.

What trained weights depend on and a fresh model should not have comes in as config: the VQGAN's odd shortcut, images
fed as [0, 1], and the VAE code that isn't divided by its scale before it is decoded.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import SIZES, AlitConfig, HaltingConfig, VAEConfig, VQGANConfig
from model.files import load_tensors
from model.tokenizer import AlitTokenizer

BaseKind = Literal["vqgan", "vae"]
DROPPED = "gan_losses."  # discriminators and LPIPS networks of finetuned checkpoints
UNUSED = "pre_quantizer_mlp."  # there, but without effect, where latents aren't factorized
LATENT_DIM = 12

# Our name of a part, at its beginning, to theirs; the first that fits is taken.
_PARTS = (
    ("encoder.positions", "encoder_positional_embedding"),
    ("encoder.class_token", "encoder_class_embedding"),
    ("encoder.mask_token", "encoder_mask_token"),
    ("decoder.positions", "decoder_positional_embedding"),
    ("decoder.class_token", "decoder_class_embedding"),
    ("decoder.mask_token", "decoder_mask_token"),
    ("encoder.latent_tokens", "latent_tokens"),
    ("encoder.latent_positions", "latent_token_positional_embedding"),
    ("encoder.rollout_embedding", "timestep_embedding"),
    ("encoder.norm_in.", "encoder_ln_pre."),
    ("encoder.norm_out.", "encoder_ln_post."),
    ("encoder.norm_rollout.", "encoder_ln_recursive."),
    ("encoder.project.", "pre_quantizer_mlp."),
    ("encoder.patch_embed.", "patch_embed."),
    ("decoder.latent_positions", "decoder.latent_token_positional_embedding"),
    ("decoder.embed.", "decoder.decoder_embed."),
    ("decoder.norm_in.", "decoder.ln_pre."),
    ("decoder.norm_out.", "decoder.ln_post."),
    ("decoder.head.", "decoder.ffn."),
    ("quantizer.codebook.", "quantize.embedding."),
    ("encoder.blocks.", "encoder.transformer."),
    ("decoder.blocks.", "decoder.transformer."),
)
_BLOCK = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attention.qkv.weight": "attn.in_proj_weight",
    "attention.qkv.bias": "attn.in_proj_bias",
    "attention.out": "attn.out_proj",
    "expand": "mlp.c_fc",
    "contract": "mlp.c_proj",
}
_BASE = {"codebook": "quantize.embedding", "to_moments": "quant_conv", "from_code": "post_quant_conv"}
_RES_BLOCK = {
    "norm_1": "norm1",
    "norm_2": "norm2",
    "conv_1": "conv1",
    "conv_2": "conv2",
    "shortcut": "nin_shortcut",
    "out": "proj_out",
}


def load_official(
    path: str | Path,
    config: Mapping[str, Any] | str,
    *,
    base: BaseKind | None = None,
    weights: Literal["ema", "model"] | None = None,
) -> AlitTokenizer:
    """A tokenizer with the weights of a checkpoint of the authors' code, in eval mode.

    ``path``: .pth (read without running code of it) or .safetensors. ``config``: the authors' argument names, or the
    name of a size (``"alit_small"``), for which the file tells the base, unless ``base`` does, and whether latents are
    quantized. ``weights``: which of a .pth file's; None takes ``ema``, else ``model``, else the file as one state dict.
    Raises ValueError naming missing and unexpected tensors, and the named size that would fit.
    """
    state = load_tensors(path, ("ema", "model") if weights is None else (weights,))
    wanted = _named_config(config, state, base) if isinstance(config, str) else official_config(config)
    try:
        return from_official(state, wanted)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_official(state: Mapping[str, Tensor], config: AlitConfig) -> AlitTokenizer:
    """A tokenizer of ``config`` from tensors by the authors' names; raises ValueError when they don't fit."""
    tokenizer = AlitTokenizer.unfilled(config)
    wanted = {name: (official_name(name, config), tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    _check(state, {theirs: tuple(shape) for theirs, shape in wanted.values()}, config)
    weights = {ours: state[theirs].float() for ours, (theirs, _) in wanted.items()}
    tokenizer.load_state_dict(weights, assign=True)
    return tokenizer.eval()


def to_official(tokenizer: AlitTokenizer) -> dict[str, Tensor]:
    """The tensors of ``tokenizer`` by the authors' names, as their strict loading wants them."""
    config = tokenizer.config
    state = {official_name(name, config): tensor.detach().clone() for name, tensor in tokenizer.state_dict().items()}
    if config.latent_dim is None:
        state[f"{UNUSED}weight"] = torch.zeros(LATENT_DIM, config.encoder_width)
        state[f"{UNUSED}bias"] = torch.zeros(LATENT_DIM)
    return state


def official_config(arguments: Mapping[str, Any]) -> AlitConfig:
    """Our config for the authors' arguments; those left out have their defaults, names without effect are ignored.

    Halting is off for a VAE whatever they say: the authors' code never halts there. Raises ValueError for what isn't
    supported.
    """
    given = {**_DEFAULTS, **arguments}
    if not given["vq_use_l2_norm"]:
        raise ValueError("vq_use_l2_norm = False: a codebook without L2 norm isn't supported; True is")
    kind, quantized = given["base_tokenizer"], bool(given["quantize_latent"])
    base = _base_config(kind, given["base_config"] or {})
    if given["patch_size"] != base.patch:
        raise ValueError(f"patch_size = {given['patch_size']}: the base has one of {base.patch} px")
    step, side = given["num_init_latent_tokens"], given["img_size"]
    return AlitConfig(
        image_size=(side, side),
        base=base,
        budgets=tuple(step * (number + 1) for number in range(given["max_rollout_iters"])),
        encoder_width=given["encoder_width"],
        encoder_layers=given["encoder_num_layers"],
        encoder_heads=given["encoder_num_heads"],
        decoder_width=given["decoder_width"],
        decoder_layers=given["decoder_num_layers"],
        decoder_heads=given["decoder_num_heads"],
        codebook_size=given["vq_codebook_size"] if quantized else None,
        latent_dim=given["vq_token_dim"] if quantized or given["factorize_latent"] else None,
        halting=HaltingConfig(bool(given["dynamic_halting"]) and kind == "vqgan", given["dynamic_halting_threshold"]),
    )


_DEFAULTS: Mapping[str, Any] = {
    "base_tokenizer": "vqgan",
    "base_config": None,
    "encoder_width": 1024,
    "encoder_num_layers": 8,
    "encoder_num_heads": 8,
    "decoder_width": 1024,
    "decoder_num_layers": 8,
    "decoder_num_heads": 8,
    "vq_codebook_size": 4096,
    "vq_token_dim": LATENT_DIM,
    "vq_use_l2_norm": True,
    "num_init_latent_tokens": 32,
    "img_size": 256,
    "patch_size": 16,
    "max_rollout_iters": 8,
    "quantize_latent": True,
    "factorize_latent": True,
    "dynamic_halting": True,
    "dynamic_halting_threshold": None,
}


def _base_config(kind: str, given: Mapping[str, Any]) -> VQGANConfig | VAEConfig:
    """The base in the authors' terms, the quirks of their weights included."""
    layers = given.get("ddconfig", given)
    sizes: dict[str, Any] = {}
    for ours, theirs in (("channels", "ch"), ("channel_multipliers", "ch_mult"), ("num_res_blocks", "num_res_blocks")):
        if theirs in layers:
            sizes[ours] = tuple(layers[theirs]) if theirs == "ch_mult" else layers[theirs]
    if "embed_dim" in given:
        sizes["embed_dim"] = given["embed_dim"]
    if kind == "vae":
        return VAEConfig(**sizes, unscale=False, symmetric=False)
    if kind != "vqgan":
        raise ValueError(f"base_tokenizer = {kind!r}: 'vqgan' or 'vae' is needed")
    if "n_embed" in given:
        sizes["codebook_size"] = given["n_embed"]
    return VQGANConfig(**sizes, shortcut="residual", symmetric=False)


def _named_config(name: str, state: Mapping[str, Tensor], base: BaseKind | None) -> AlitConfig:
    """A size of the paper for the base and the kind of latents that ``state`` holds."""
    sizes = sorted(name for name in SIZES if name.startswith("alit_"))
    if name not in sizes:
        raise ValueError(f"config = {name!r}: a size is needed, one of {sizes}, or the authors' arguments")
    if base is None:
        base = "vae" if any(key.startswith("base_tokenizer.vae.") for key in state) else "vqgan"
    quantized, factorized = "quantize.embedding.weight" in state, "decoder.decoder_embed.weight" in state
    halting = HaltingConfig(enabled=base == "vqgan")
    config = replace(SIZES[name], base=_base_config(base, {}), halting=halting)
    if quantized:
        return config
    return replace(config, codebook_size=None, latent_dim=LATENT_DIM if factorized else None)


def official_name(name: str, config: AlitConfig) -> str:
    """The authors' name of our tensor ``name``."""
    if name.startswith("base."):
        return f"base_tokenizer.{config.base.kind}.{_base_name(name.removeprefix('base.'), config.base)}"
    for ours, theirs in _PARTS:
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            return theirs + (_in_block(rest) if theirs.endswith("transformer.") else rest)
    raise ValueError(f"{name}: the authors' model has no such tensor")


def _in_block(rest: str) -> str:
    number, _, part = rest.partition(".")
    for ours, theirs in _BLOCK.items():
        if part.startswith(ours):
            return f"{number}.{theirs}{part.removeprefix(ours)}"
    raise ValueError(f"{rest}: the authors' blocks have no such tensor")


def _base_name(name: str, base: VQGANConfig | VAEConfig) -> str:
    """Their convolutions count decoder levels from the finest, and keep attention apart from the blocks."""
    part, _, rest = name.partition(".")
    if part in _BASE:
        return f"{_BASE[part]}.{rest}"
    attends, levels = base.kind == "vae", len(base.channel_multipliers)
    last = levels - 1
    match = re.fullmatch(r"(levels|middle|downsample|upsample)\.(\d+)\.(?:(\d+)\.(?=\w+\.))?(.+)", rest)
    if match is None:
        return f"{part}.{rest}"
    kind, number, field = match[1], int(match[2]), match[4]
    level = number if part == "encoder" else last - number
    side = "down" if part == "encoder" else "up"
    if kind in ("downsample", "upsample"):
        return f"{part}.{side}.{level}.{kind}.conv.{field}"
    field = ".".join(_RES_BLOCK.get(word, word) for word in field.split("."))
    if kind == "middle":
        places = ("block_1", "attn_1", "block_2") if attends else ("block_1", "block_2")
        return f"{part}.mid.{places[number]}.{field}"
    place = int(match[3])
    if attends and part == "encoder" and level == last:
        return f"{part}.{side}.{level}.{'attn' if place % 2 else 'block'}.{place // 2}.{field}"
    return f"{part}.{side}.{level}.block.{place}.{field}"


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], config: AlitConfig) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(DROPPED)}
    if config.latent_dim is None:
        found = {name: shape for name, shape in found.items() if not name.startswith(UNUSED)}
    problems = [f"missing {_some(set(wanted) - set(found))}"] if set(wanted) - set(found) else []
    if set(found) - set(wanted):
        problems.append(f"unexpected {_some(set(found) - set(wanted))}")
    for name in sorted(set(found) & set(wanted)):
        if found[name] != wanted[name]:
            problems.append(f"{name} is {list(found[name])} and not {list(wanted[name])}")
            break
    if problems:
        raise ValueError(f"the weights don't fit the config: {'; '.join(problems)}. {_advice(state)}")


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{len(names)} tensors ({shown}{', …' if len(names) > 5 else ''})"


def _advice(state: Mapping[str, Tensor]) -> str:
    """Which named size the weights have, as far as width and layers tell."""
    if "encoder_positional_embedding" not in state:
        return "They have no encoder_positional_embedding, so this is no ALIT checkpoint"
    width = state["encoder_positional_embedding"].shape[-1]
    depth = len({name.split(".")[2] for name in state if name.startswith("encoder.transformer.")})
    base = "vae" if any(name.startswith("base_tokenizer.vae.") for name in state) else "vqgan"
    kind = "quantized" if "quantize.embedding.weight" in state else "continuous"
    fits = [name for name, size in SIZES.items() if (size.encoder_width, size.encoder_layers) == (width, depth)]
    size = f"config {fits[0]!r} would fit" if fits else "no named config has that"
    return f"They have width {width}, {depth} encoder layers, a {base} base and {kind} latents: {size}"
