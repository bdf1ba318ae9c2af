"""Typed configs and one table of named sizes. Frozen dataclasses; every error names field and value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

# Read by pydantic, which validates run configs: an unknown key is an error there too.
_STRICT: dict[str, str] = {"extra": "forbid"}


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: {allowed}")


@dataclass(frozen=True)
class VQGANConfig:
    """A convolutional VQGAN in the MAGE layout (ALIT uses f16, 1024 codes x 256).

    ``shortcut``: where a block that changes its channel count takes its skip from: ``"input"`` (the usual residual) or
    ``"residual"`` (the authors' checkpoints: the 1x1 convolution is applied to the branch's own output).
    ``symmetric``: pixels are mapped to [-1, 1] before the encoder and back after the decoder; the authors feed [0, 1].
    """

    kind: Literal["vqgan"] = "vqgan"
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    embed_dim: int = 256
    codebook_size: int = 1024
    num_groups: int = 32
    shortcut: Literal["input", "residual"] = "input"
    symmetric: bool = True

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _check_convolutions(self.channels, self.channel_multipliers, self.num_groups)
        _require(self.embed_dim >= 1, "base.embed_dim", self.embed_dim, "at least 1")
        _require(self.codebook_size >= 2, "base.codebook_size", self.codebook_size, "at least 2")

    @property
    def patch(self) -> int:
        """Side in px of the square that one grid token stands for."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class VAEConfig:
    """A KL autoencoder in the layout of LDM and MAR (f16, 16 channels).

    ``latent_scale`` multiplies the posterior before ALIT sees it; ``unscale``: whether it is divided out again before
    the decoder (the authors don't, and their finetuned decoders have adapted to that).
    """

    kind: Literal["vae"] = "vae"
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    embed_dim: int = 16
    num_groups: int = 32
    latent_scale: float = 0.2325
    unscale: bool = True
    symmetric: bool = True

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _check_convolutions(self.channels, self.channel_multipliers, self.num_groups)
        _require(self.embed_dim >= 1, "base.embed_dim", self.embed_dim, "at least 1")
        _require(self.latent_scale > 0, "base.latent_scale", self.latent_scale, "positive")

    @property
    def patch(self) -> int:
        """Side in px of the square that one grid token stands for."""
        return 2 ** (len(self.channel_multipliers) - 1)


BaseConfig = VQGANConfig | VAEConfig
# By kind; model.base.register_base adds others.
BASE_CONFIGS: dict[str, type[Any]] = {"vqgan": VQGANConfig, "vae": VAEConfig}


def base_config(values: Mapping[str, Any]) -> BaseConfig:
    """The config of a base from JSON values; raises ValueError or TypeError on a bad field."""
    kind = values.get("kind")
    _require(kind in BASE_CONFIGS, "base.kind", kind, f"one of {sorted(BASE_CONFIGS)}")
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return BASE_CONFIGS[values["kind"]](**fields)


def _check_convolutions(channels: int, multipliers: tuple[int, ...], groups: int) -> None:
    _require(len(multipliers) >= 1, "base.channel_multipliers", multipliers, "at least one level")
    for multiplier in multipliers:
        _require(
            channels * multiplier > 0 and channels * multiplier % groups == 0,
            "base.channels * multiplier",
            channels * multiplier,
            f"a positive multiple of base.num_groups = {groups}",
        )


@dataclass(frozen=True)
class HaltingConfig:
    """Dynamic halting (paper section 3): 2D tokens that are already reconstructed are masked from the next rollout.

    ``threshold``: for a VQGAN the least probability of the true index (authors: 0.55), for a VAE the largest mean
    absolute error of the code (authors: 0.025); None takes the authors' value for the base.
    """

    enabled: bool = False
    threshold: float | None = None

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class AlitConfig:
    """The adaptive-length tokenizer (arXiv 2411.02393).

    ``budgets``: latent tokens after each rollout, increasing; the paper's are 32, 64, … 256. ``codebook_size`` None
    makes the latents continuous. ``latent_dim`` None leaves them at ``encoder_width`` (only when continuous).
    ``init``: how the weights start: as the paper's, or as ``model.local_start`` says, which a short training needs.
    """

    image_size: tuple[int, int] = (256, 256)
    base: VQGANConfig | VAEConfig = field(default_factory=VQGANConfig)
    budgets: tuple[int, ...] = tuple(range(32, 257, 32))
    encoder_width: int = 1024
    encoder_layers: int = 8
    encoder_heads: int = 8
    decoder_width: int = 1024
    decoder_layers: int = 8
    decoder_heads: int = 8
    codebook_size: int | None = 4096
    latent_dim: int | None = 12
    halting: HaltingConfig = field(default_factory=HaltingConfig)
    init: Literal["paper", "local"] = "paper"

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _require(
            all(side > 0 and side % self.base.patch == 0 for side in self.image_size),
            "image_size",
            self.image_size,
            f"positive multiples of the base's patch, {self.base.patch} px",
        )
        rises = bool(self.budgets) and min(self.steps) > 0
        _require(rises, "budgets", list(self.budgets), "positive and increasing, e.g. [32, 64]")
        for name in ("encoder", "decoder"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            _require(heads > 0 and width % heads == 0, f"{name}_width", width, f"a multiple of {name}_heads = {heads}")
            layers = getattr(self, f"{name}_layers")
            _require(layers > 0, f"{name}_layers", layers, "at least 1")
        allowed = f"more than base.embed_dim = {self.base.embed_dim}"
        _require(self.encoder_width > self.base.embed_dim, "encoder_width", self.encoder_width, allowed)
        if self.latent_dim is None:
            _require(self.codebook_size is None, "latent_dim", None, "a number when the latents are quantized")
            _require(
                self.encoder_width == self.decoder_width,
                "decoder_width",
                self.decoder_width,
                f"encoder_width = {self.encoder_width} when latent_dim is None",
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """Latents that each rollout adds."""
        return tuple(b - a for a, b in zip((0, *self.budgets[:-1]), self.budgets, strict=True))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the 2D token grid."""
        return self.image_size[0] // self.base.patch, self.image_size[1] // self.base.patch

    @property
    def channels_per_latent(self) -> int:
        """D: numbers in one latent token."""
        return self.latent_dim or self.encoder_width

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AlitConfig":
        """The inverse of :meth:`to_dict`; raises ValueError or TypeError on a bad field."""
        values = dict(values)
        return cls(
            base=base_config(values.pop("base")),
            halting=HaltingConfig(**values.pop("halting", {})),
            image_size=tuple(values.pop("image_size")),
            budgets=tuple(values.pop("budgets")),
            **values,
        )


def _sized(width: int, layers: int, heads: int, base: VQGANConfig | None = None) -> AlitConfig:
    return AlitConfig(
        base=base or VQGANConfig(),
        encoder_width=width,
        encoder_layers=layers,
        encoder_heads=heads,
        decoder_width=width,
        decoder_layers=layers,
        decoder_heads=heads,
    )


_DEMO_BASE = VQGANConfig(
    channels=16, channel_multipliers=(1, 1, 2, 4), num_res_blocks=1, embed_dim=32, codebook_size=512, num_groups=8
)

# The paper's sizes by the names of its code ("small" has more parameters than "base"), and ours.
SIZES: Mapping[str, AlitConfig] = MappingProxyType(
    {
        "alit_tiny": _sized(512, 8, 8),
        "alit_small": _sized(1024, 8, 8),
        "alit_base": _sized(768, 12, 12),
        "alit_semilarge": _sized(1024, 16, 16),
        "demo": replace(
            _sized(128, 2, 4, _DEMO_BASE),
            image_size=(64, 64),
            budgets=tuple(range(8, 65, 8)),
            codebook_size=1024,
            init="local",
        ),
    }
)

PAPER_ROLLOUT_WEIGHTS = (2.5, 2.0, 1.5, 1.25)  # of the first rollouts; 1 for those that follow


@dataclass(frozen=True)
class BaseObjectiveConfig:
    """Pixel losses of the base tokenizer's own training.

    ``revive_every``: steps between revivals of unused entries of a VQGAN's codebook; 0 is never.
    """

    l1_weight: float = 1.0
    mse_weight: float = 1.0
    regulariser_weight: float = 1.0
    revive_every: int = 0

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class DistillConfig:
    """Latent distillation (paper section 4, stage 1). Defaults are the paper's, but for the label smoothing.

    The authors build their criterion with smoothing 0.1 and then use its unsmoothed part; here it smooths when set.
    ``pixel_weight``: L1 of the images through the frozen base decoder; 0 in the paper's stage 1.
    ``sampled_rollouts``: how many rollouts, drawn anew each step, are decoded and enter the loss; None is all of them.
    ``revive_every``: steps between revivals of unused codebook entries; 0, the paper's, is never.
    ``decoder_first_steps``: for so many steps the encoder and the codebook rest; pays off with ``init = "local"``.
    """

    token_weight: float = 1.0
    label_smoothing: float = 0.0
    code_weight: float = 1.0
    quantizer_weight: float = 1.0
    pixel_weight: float = 0.0
    rollout_weights: tuple[float, ...] | None = None
    sampled_rollouts: int | None = None
    revive_every: int = 0
    decoder_first_steps: int = 0

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        sampled, smoothing = self.sampled_rollouts, self.label_smoothing
        _require(sampled is None or sampled >= 1, "sampled_rollouts", sampled, "None or at least 1")
        _require(0 <= smoothing < 1, "label_smoothing", smoothing, "at least 0 and below 1")

    def weight(self, rollout: int) -> float:
        """Weight of the token loss after ``rollout``."""
        weights = self.rollout_weights or PAPER_ROLLOUT_WEIGHTS
        return weights[rollout] if rollout < len(weights) else 1.0
