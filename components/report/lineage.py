"""Where the page comes from: data, code, artifacts; and when each stage ran."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from components.artifacts import Artifact

ROOT = Path(__file__).parents[2]
SOFTWARE = ("alit-pipeline", "torch", "ray", "mlflow")
PAUSE_S = 60.0  # with nothing running for longer, the chart leaves the time out
NARROWEST = 0.004  # share of the axis that a stage of no time still gets
GIT_S = 10.0


@dataclass(frozen=True)
class Bar:
    """One stage on the time axis; ``left`` and ``width`` are shares of it."""

    stage: str
    started: str
    seconds: float
    left: float
    width: float
    pause_s: float  # left out before this stage


def code_version() -> dict[str, str]:
    """The versions of the software, and the git commit where this runs from a checkout."""
    found = {}
    for package in SOFTWARE:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a submitted job brings the code along, uninstalled
            continue
    commit = git_commit()
    return found | ({"git commit": commit} if commit else {})


def git_commit() -> str | None:
    """The commit of the checkout that this code is in, ``+changes`` where files differ from it; None: no checkout."""
    if not (ROOT / ".git").exists():
        return None
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


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
