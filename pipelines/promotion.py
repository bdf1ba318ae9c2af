"""``alit promote`` and ``alit rollback``: which version of a registered model is the champion, by hand."""

import time
from collections.abc import Iterator, Mapping

from components.registry import CHALLENGER, CHAMPION, PREVIOUS, aliases_of, move_aliases
from components.tracking import redact, store_for
from pipelines.config import AnyConfig, ConfigError, RerunConfig, user_errors
from pipelines.runner import absolute

Moves = Mapping[str, int | None]  # alias -> version, None: to none


def promoted(aliases: Mapping[str, int], version: int | None) -> Moves:
    """What makes ``version`` (None: the challenger) the champion. Raises ConfigError."""
    new = aliases.get(CHALLENGER) if version is None else version
    if new is None:
        raise ConfigError(f"there is no {CHALLENGER} to promote; name one with --version N (aliases: {_told(aliases)})")
    old = aliases.get(CHAMPION)
    if new == old:
        raise ConfigError(f"version {new} is the {CHAMPION} already")
    moves: dict[str, int | None] = {CHAMPION: new}
    if old is not None:
        moves[PREVIOUS] = old
    if aliases.get(CHALLENGER) == new:
        moves[CHALLENGER] = None
    return moves


def rolled_back(aliases: Mapping[str, int]) -> Moves:
    """What makes the previous champion the champion again, and the present one challenger, which undoes it."""
    if PREVIOUS not in aliases:
        raise ConfigError(f"there is no {PREVIOUS} version to go back to (aliases: {_told(aliases)})")
    old, present = aliases[PREVIOUS], aliases.get(CHAMPION)
    challenger = aliases.get(CHALLENGER) if present == old else present  # the same: a rollback that was broken off
    return {CHAMPION: old, PREVIOUS: None, CHALLENGER: challenger}


def promote(config: AnyConfig, version: int | None = None) -> Iterator[str]:
    """Promote the challenger, or ``version``; yields what has changed. Raises ConfigError."""
    registry, name = _place(config)
    aliases = _aliases(registry, name)
    yield from _moved(registry, name, aliases, promoted(aliases, version))


def rollback(config: AnyConfig) -> Iterator[str]:
    """Return to the previous champion; yields what has changed. Raises ConfigError."""
    registry, name = _place(config)
    aliases = _aliases(registry, name)
    yield from _moved(registry, name, aliases, rolled_back(aliases))


def _place(config: AnyConfig) -> tuple[str, str]:
    """The registry, and the model's name in it."""
    name = config.model_name if isinstance(config, RerunConfig) else config.publish.model_name
    with user_errors():
        return store_for(config.mlflow, absolute(config.workspace)).uri, name


def _aliases(registry: str, name: str) -> dict[str, int]:
    with user_errors():
        return aliases_of(registry, name)


def _moved(registry: str, name: str, before: Mapping[str, int], moves: Moves) -> Iterator[str]:
    reason = f"by hand at {time.strftime('%Y-%m-%d %H:%M:%S')}, from champion version {before.get(CHAMPION, 'none')}"
    with user_errors():
        move_aliases(registry, name, to=moves, reason=reason)
    yield f"{name} in {redact(registry)}"
    for alias, version in moves.items():
        yield f"{alias:<12}{_version(before.get(alias))} -> {_version(version)}"


def _version(number: int | None) -> str:
    return "none" if number is None else f"version {number}"


def _told(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{alias} version {version}" for alias, version in sorted(aliases.items())) or "none"
