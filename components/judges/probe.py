"""A probe: a light head on frozen EfficientNet-Lite0 features, trained on the ImageSet's own labels, depth or masks.

Legend: B batch, C channels or classes, D numbers in an embedding, H W height and width in px, h w those of a map.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.judges.classes import Classes
from components.judges.efficientnet import SIZE_PX, load_network
from components.judges.judge import Judge, JudgeInput
from components.task_config import Answer, Target
from model.efficientnet import EfficientNetLite0
from model.objectives import MODEL_TURN, Loss, Objective, Term, Turn

STAGES = (24, 40, 112, 320)  # channels of the backbone's maps at strides 4, 8, 16 and 32
WIDTH = 64  # of the decoder
WEIGHTS, CONFIG = "weights.safetensors", "probe.json"
ANSWERS: dict[Target, Answer] = {"label": "classes", "depth": "depth", "mask": "segments"}
FARTHEST_LOG = 7.0  # e^7 m is about 1 km: what a head says beyond is no depth


@dataclass(frozen=True)
class ProbeConfig:
    """What a probe is made of; ``outputs``: classes, 1 for depth."""

    target: Target
    outputs: int
    size: int = SIZE_PX
    classes: Classes = ()


class LabelHead(nn.Module):
    """Linear on the standardised embedding: [B, 1280] -> class scores [B, C]."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(1280, elementwise_affine=False)
        self.linear = nn.Linear(1280, outputs)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """Scores."""
        return self.linear(self.norm(embedding_BD))


class MapHead(nn.Module):
    """Maps at strides 32 to 4, standardised, coarse to fine, added up and filtered: -> [B, C, h, w] at stride 4."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.norm = nn.ModuleList(nn.GroupNorm(1, channels, affine=False) for channels in STAGES)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, WIDTH, 1) for channels in STAGES)
        self.smooth = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in STAGES)
        self.out = nn.Conv2d(WIDTH, outputs, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Scores of classes, or the logarithm of depth."""
        x = None
        for stage in reversed(range(len(STAGES))):
            here = self.lateral[stage](self.norm[stage](maps[stage]))
            x = here if x is None else here + F.interpolate(x, size=here.shape[2:], mode="bilinear")
            x = x + F.gelu(self.smooth[stage](x))
        return self.out(x)


class Probe(nn.Module):
    """Frozen backbone and head."""

    def __init__(self, config: ProbeConfig, backbone: EfficientNetLite0) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone.requires_grad_(False).eval()
        self.head = LabelHead(config.outputs) if config.target == "label" else MapHead(config.outputs)

    def train(self, mode: bool = True) -> "Probe":
        """The backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def raw(self, images: Tensor) -> Tensor:
        """What the head makes of images [B, 3, H, W] in [0, 1] at the probe's size; of depth its logarithm."""
        with torch.no_grad():
            seen = self.backbone.embed(images) if self.config.target == "label" else self.backbone.stages(images)[1:]
        return self.head(seen)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, C], depth [B, h, w] in metres, or scores [B, C, h, w], of images as :meth:`raw` takes."""
        made = self.raw(images)
        return made[:, 0].clamp(-FARTHEST_LOG, FARTHEST_LOG).exp() if self.config.target == "depth" else made

    def save(self, folder: str | Path) -> None:
        """Weights, the backbone's included, and config."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, Path(folder) / WEIGHTS)
        Path(folder, CONFIG).write_text(json.dumps(asdict(self.config)))

    @classmethod
    def load(cls, folder: str | Path) -> "Probe":
        """The probe saved in ``folder``, in eval mode."""
        values = json.loads(Path(folder, CONFIG).read_text())
        classes = tuple(tuple(labels) for labels in values.pop("classes"))
        probe = cls(ProbeConfig(**values, classes=classes), EfficientNetLite0())
        probe.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return probe.eval()

    @classmethod
    def fresh(cls, config: ProbeConfig) -> "Probe":
        """An untrained head on the backbone of the ``judges`` extra; raises ValueError without it."""
        return cls(config, load_network(None))


class ProbeJudge(Judge):
    """A trained probe."""

    def __init__(self, probe: Probe) -> None:
        self._probe, config = probe.requires_grad_(False).eval(), probe.config
        self.answers, self.input = (ANSWERS[config.target],), JudgeInput(config.size)
        self.classes = config.classes

    def answer(self, images: Tensor) -> dict[str, Tensor]:
        """What the head says."""
        return {self.answers[0]: self._probe(images)}

    def to(self, device: str) -> None:
        """Move the network."""
        self._probe.to(device)

    def save(self, folder: str) -> None:
        """Weights and config."""
        self._probe.save(folder)


class ProbeObjective(Objective):
    """Cross-entropy of labels and of mask pixels, or the mean absolute error of the logarithm of depth.

    Pixels without a reading, masked out, and images without a label don't count.
    """

    health = None

    def __init__(self, probe: Probe, ignore: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.probe, self.ignore = probe, ignore
        self.input = JudgeInput(probe.config.size)

    def trainable(self, player: str = "model") -> dict[str, nn.Parameter]:
        """The head's."""
        return {name: p for name, p in self.named_parameters() if name.startswith("probe.head.")}

    def forward(self, images: Tensor, generator: torch.Generator, turn: Turn = MODEL_TURN) -> Loss:
        """Loss of images [B, 3, H, W] in [0, 1] against ``turn.targets``: label, depth or mask."""
        target, made = self.probe.config.target, self.probe.raw(self.input.prepare(images))
        loss = self._loss(made, turn.targets[target])
        return Loss(loss, (Term(target, None, loss.detach()),))

    def _loss(self, made: Tensor, true: Tensor) -> Tensor:
        target = self.probe.config.target
        if target == "label":
            return _cross_entropy(made, true)
        if target == "mask":
            known = true.long()
            for number in self.ignore:
                known = known.masked_fill(known == number, -1)
            return _cross_entropy(F.interpolate(made, size=true.shape[1:], mode="bilinear"), known)
        made = F.interpolate(made, size=true.shape[1:], mode="bilinear")[:, 0]
        valid = torch.isfinite(true) & (true > 0)
        error = (made - torch.where(valid, true, 1.0).log()).abs()
        return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)


def _cross_entropy(scores: Tensor, true: Tensor) -> Tensor:
    """A mean over what isn't -1; 0, and no gradient, where nothing is."""
    total = F.cross_entropy(scores.float(), true.long(), ignore_index=-1, reduction="sum")
    return total / (true >= 0).sum().clamp(min=1)
