"""Which code this is: for the record, so that a result can be made again."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("alit-pipeline", "torch", "ray", "mlflow")
GIT_S = 10.0


def versions() -> dict[str, str]:
    """Those of this software and of what it stands on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a submitted job brings the code along, uninstalled
            continue
    return found


@cache
def git_commit() -> str | None:
    """The commit of the checkout that this code is in, ``+changes`` where files differ from it; None: no checkout."""
    if not (ROOT / ".git").exists():
        return None
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def lineage_tags() -> dict[str, str]:
    """The same as MLflow tags, the commit under the name that MLflow's page links."""
    commit = git_commit()
    return {"alit.code_version": versions().get("alit-pipeline", "not installed")} | (
        {"mlflow.source.git.commit": commit} if commit else {}
    )


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
