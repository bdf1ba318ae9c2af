"""The commands that take a tokenizer and no config: encode, decode, import-checkpoint."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pipelines.config import ConfigError, user_errors

_out = logging.getLogger("alit")


class Add(Protocol):
    """Adds a command to the parser."""

    def __call__(
        self, name: str, command: Callable[[argparse.Namespace], int], help_text: str
    ) -> argparse.ArgumentParser:
        """The command's own parser."""


def add_model_commands(add: Add) -> None:
    """Add them."""
    encode = add("encode", _encode, "Encode a folder of images into a token archive.")
    _add_paths(encode, "images: a folder, .tar shards, .parquet tables or a manifest, local or s3://")
    count = encode.add_mutually_exclusive_group(required=True)
    count.add_argument("--task", help="the rule registered with the model for this task")
    count.add_argument("--tokens", type=int, metavar="N", help="the same number for every image")
    count.add_argument("--max-l1", type=float, metavar="X", help="the fewest tokens with a mean absolute error up to X")
    decode = add("decode", _decode, "Decode a token archive into PNG files.")
    _add_paths(decode, "a token archive")
    imported = add("import-checkpoint", _import_checkpoint, "Read a checkpoint of the paper's own code.")
    imported.add_argument("file", help="a .pth or .safetensors file")
    imported.add_argument("--base", required=True, choices=["vqgan", "vae"], help="its base tokenizer")
    size = imported.add_mutually_exclusive_group()
    size.add_argument("--size", default="alit_small", help="its size's name (default: alit_small)")
    size.add_argument("--config", metavar="JSON", help="a file with the paper's own argument names, for another size")
    imported.add_argument("--output", required=True, help="a folder; made if missing")


def _add_paths(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--model", required=True, help="a tokenizer's folder, starter, or models:/NAME@ALIAS")
    parser.add_argument("--input", required=True, help=what)
    parser.add_argument("--output", required=True, help="a folder; made if missing")


def _encode(options: argparse.Namespace) -> int:
    from components.codec import EncodeRequest, encode_folder
    from components.config import RuleConfig
    from components.registry import registered_rules, resolve_model
    from components.rules import HEADS

    with user_errors():
        model = resolve_model(options.model)
    rule: RuleConfig | int
    if options.tokens is not None:
        rule = options.tokens
    elif options.max_l1 is not None:
        rule = RuleConfig(kind="threshold", metric="l1", max=options.max_l1)
    else:
        rules = registered_rules(model)
        if options.task not in rules:
            raise ConfigError(f"--task {options.task!r}: the model has rules for {sorted(rules)}")
        rule = rules[options.task]
    with user_errors():
        head = str(Path(model) / HEADS / str(options.task))
        figures = encode_folder(EncodeRequest(model, options.input, options.output, rule, head), _progress)
    _out.info(
        "%d images, %d rejected, %.1f tokens a mean image -> %s",
        *(figures[name] for name in ("images", "rejected", "mean_tokens")),
        options.output,
    )
    return 0


def _decode(options: argparse.Namespace) -> int:
    from components.codec import decode_archive
    from components.registry import resolve_model
    from components.store import exists, join

    if not exists(join(options.input, "tokenizer.json")):
        raise ConfigError(f"--input {options.input!r}: a token archive (a folder with tokenizer.json) is needed")
    with user_errors():
        figures = decode_archive(resolve_model(options.model), options.input, options.output, _progress)
    _out.info("%d images -> %s", figures["images"], options.output)
    return 0


def _import_checkpoint(options: argparse.Namespace) -> int:
    from model.official import load_official

    for file in (options.file, *([options.config] if options.config else [])):
        if not Path(file).is_file():
            raise ConfigError(f"{file!r}: no such file")
    with user_errors():
        config = json.loads(Path(options.config).read_text()) if options.config else options.size
        tokenizer = load_official(options.file, config, base=options.base)
    if tokenizer.config.base.kind != options.base:
        raise ConfigError(f"--base {options.base!r}: {options.config} says {tokenizer.config.base.kind!r}")
    tokenizer.save(options.output)
    millions = sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6
    _out.info("%s base, %.1f M parameters -> %s", options.base, millions, options.output)
    return 0


def _progress(line: str) -> None:
    logging.getLogger(__name__).info("%s", line)
