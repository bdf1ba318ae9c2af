"""What a submitted job brings along: the files of a folder that are code, and the config, as one zip."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipelines.config import ConfigError

LIMIT_BYTES = 50 * 2**20  # Ray's job server takes requests of up to twice that
NOT_SENT = GitIgnoreSpec.from_lines(
    (".*", "__pycache__/", "venv/", "node_modules/", "*.egg-info/", "/data/", "/runs/", "/mlruns/", "mlflow.db")
)
IGNORE_FILES = (".gitignore", ".rayignore")
CONFIG_FOLDER = "alit-submitted"  # within the zip
NAMED = 5  # of the biggest files, when all are too much
EPOCH = (1980, 1, 1, 0, 0, 0)  # one time for all: the same files make the same zip, which Ray then has already
MIB = 2**20


@dataclass(frozen=True)
class Bundle:
    """A zip on disk."""

    file: Path
    config: str  # path of the config within it
    num_files: int
    size_bytes: int  # before compression


def make_bundle(folder: Path, *, config: Path, output: Path) -> Bundle:
    """Zip the code in ``folder``, and the file ``config`` wherever it lies, as ``output``.

    Left out are hidden files, environments, caches, ``data``, ``runs``, and what files called ``.gitignore`` and
    ``.rayignore`` name. Raises ConfigError when ``folder`` is none, or when there are more than LIMIT_BYTES.
    """
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {str(folder)!r}: no such folder")
    files = list(_files(folder, ((folder, NOT_SENT),)))
    size = _checked_size(folder, files)
    name = f"{CONFIG_FOLDER}/{config.name}"
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            _add(archive, file, file.relative_to(folder).as_posix())
        _add(archive, config, name)
    return Bundle(output, name, len(files) + 1, size + config.stat().st_size)


def _files(folder: Path, rules: tuple[tuple[Path, GitIgnoreSpec], ...]) -> Iterator[Path]:
    """Files below ``folder`` that no rule (each with the folder it was made for) leaves out; links to folders aren't
    followed."""
    here = (folder / name for name in IGNORE_FILES)
    own = ((folder, GitIgnoreSpec.from_lines(file.read_text().splitlines())) for file in here if file.is_file())
    rules = (*rules, *own)
    for path in sorted(folder.iterdir()):
        end = "/" if path.is_dir() else ""
        if any(spec.match_file(f"{path.relative_to(root).as_posix()}{end}") for root, spec in rules):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path, rules)
        elif path.is_file():
            yield path


def _checked_size(folder: Path, files: list[Path]) -> int:
    sizes = {file: file.stat().st_size for file in files}
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        biggest = sorted(sizes, key=lambda file: -sizes[file])[:NAMED]
        named = ", ".join(f"{file.relative_to(folder)} ({sizes[file] / MIB:.1f} MiB)" for file in biggest)
        raise ConfigError(
            f"--working-dir {str(folder)!r}: {len(files)} files of {total / MIB:.1f} MiB are more than "
            f"{LIMIT_BYTES / MIB:.0f} MiB; the biggest are {named}. Name in {folder}/.rayignore what the job "
            "does not need"
        )
    return total


def _add(archive: zipfile.ZipFile, file: Path, name: str) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (file.stat().st_mode & 0o755) << 16
    archive.writestr(entry, file.read_bytes())
