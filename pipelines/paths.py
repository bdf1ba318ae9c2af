"""Local files that a config names, as absolute paths: workers have another working directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.sources import DEMO


def absolute(path: str) -> str:
    """A local path from the root; an empty one stays empty."""
    return str(Path(path).expanduser().absolute()) if path else path


def local(place: object) -> object:
    """A local path from the root; an address, the demo's name and what is no text stay as they are."""
    return absolute(place) if isinstance(place, str) and place != DEMO and "://" not in place else place


def with_analysis_paths(analyze: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``analyze`` of a config, not yet checked, with its files as absolute paths."""
    made = dict(analyze)
    if "complexity_scores" in made:
        made["complexity_scores"] = local(made["complexity_scores"])
    if isinstance(made.get("ood"), list):
        made["ood"] = [_with_source(one) if isinstance(one, dict) else one for one in made["ood"]]
    return made


def _with_source(one: Mapping[str, Any]) -> dict[str, Any]:
    return {**one, "source": local(one["source"])} if "source" in one else dict(one)
