"""When each stage ran."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from components.artifacts import Artifact

PAUSE_S = 60.0  # with nothing running for longer, the chart leaves the time out
NARROWEST = 0.004  # share of the axis that a stage of no time still gets


@dataclass(frozen=True)
class Bar:
    """One stage on the time axis; ``left`` and ``width`` are shares of it."""

    stage: str
    started: str
    seconds: float
    left: float
    width: float
    pause_s: float  # left out before this stage


def gantt(artifacts: Sequence[Artifact]) -> list[Bar]:
    """When each stage ran, from the manifests: an artifact is created when its stage ends.

    Times when nothing ran, such as the nights between two runs, are cut out of the axis.
    """
    ended = [datetime.fromisoformat(artifact.manifest.created) for artifact in artifacts]
    spans = [
        (end - timedelta(seconds=artifact.manifest.seconds), end, artifact.manifest)
        for artifact, end in zip(artifacts, ended, strict=True)
    ]
    spans.sort(key=lambda span: span[:2])
    cut, busy_until = 0.0, spans[0][0]
    pauses, cuts = [], []
    for start, end, _ in spans:
        idle = (start - busy_until).total_seconds()
        pauses.append(idle if idle > PAUSE_S else 0.0)
        cuts.append(cut := cut + pauses[-1])
        busy_until = max(busy_until, end)
    began = spans[0][0]
    length = max((busy_until - began).total_seconds() - cut, 1.0)
    return [
        Bar(
            stage=manifest.stage,
            started=f"{start:%Y-%m-%d %H:%M:%S}",
            seconds=manifest.seconds,
            left=((start - began).total_seconds() - cuts[at]) / length,
            width=max(manifest.seconds / length, NARROWEST),
            pause_s=pauses[at],
        )
        for at, (start, _, manifest) in enumerate(spans)
    ]
