"""Where a tokenizer named on the command line is."""

import json
from pathlib import Path

from components import registry
from components.config import RuleConfig
from model.starter import STARTER


def resolve_model(name: str) -> str:
    """The local folder of ``starter``, a Tokenizer's folder, or a registered ``models:/NAME@ALIAS`` (downloaded).

    Raises ValueError when there is no tokenizer.
    """
    folder = Path(STARTER if name == "starter" else registry.download_tokenizer(name) if ":/" in name else name)
    if not (folder / "weights.safetensors").is_file() or not (folder / "config.json").is_file():
        raise ValueError(f"--model {name!r}: no tokenizer there; starter, a Tokenizer's folder or models:/NAME@ALIAS")
    return str(folder)


def registered_rules(folder: str) -> dict[str, RuleConfig]:
    """The rule of each task that the model in ``folder`` was published with; none for a bare Tokenizer artifact."""
    file = Path(folder) / "rules.json"
    rules = json.loads(file.read_text()) if file.is_file() else {}
    return {task: RuleConfig.model_validate(rule) for task, rule in rules.items()}
