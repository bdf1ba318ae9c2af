"""Aliases by hand: what moves, and what is refused."""

import pytest

from pipelines.config import ConfigError
from pipelines.promotion import promoted, rolled_back


def after(aliases: dict[str, int], moves: dict[str, int | None]) -> dict[str, int]:
    return {alias: version for alias, version in {**aliases, **moves}.items() if version is not None}


def test_the_challenger_becomes_champion_and_back() -> None:
    aliases = {"champion": 1, "challenger": 2}
    promotion = after(aliases, promoted(aliases, None))
    assert promotion == {"champion": 2, "previous": 1}
    back = after(promotion, rolled_back(promotion))
    assert back == {"champion": 1, "challenger": 2}  # so that promoting undoes it


def test_a_rollback_that_was_broken_off_ends_as_if_it_had_not_been() -> None:
    aliases = {"champion": 2, "previous": 1}
    halfway = {**aliases, "challenger": 2, "champion": 1}
    assert after(halfway, rolled_back(halfway)) == after(aliases, rolled_back(aliases))


def test_any_version_can_be_promoted() -> None:
    assert promoted({}, 3) == {"champion": 3}
    assert promoted({"champion": 1, "challenger": 2}, 3) == {"champion": 3, "previous": 1}


def test_what_is_refused_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no challenger to promote.*champion version 1"):
        promoted({"champion": 1}, None)
    with pytest.raises(ConfigError, match="version 1 is the champion already"):
        promoted({"champion": 1}, 1)
    with pytest.raises(ConfigError, match="no previous version to go back to.*champion version 1"):
        rolled_back({"champion": 1})
