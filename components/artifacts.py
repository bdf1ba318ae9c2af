"""Typed artifacts: folders of Parquet or safetensors that become real when ``artifact.json`` is written, last.

An artifact lives in ``<workspace>/<stage>/<key>/`` on a local disk or in a bucket (``s3://``). A stage writes into a
:class:`Draft`, a folder beside the finished ones that nobody reads; :meth:`Draft.commit` moves it into place, so what
stands under a key is whole, and a stage that is killed leaves nothing there.
"""

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, log2
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from components import buckets
from components.store import exists, filesystem, join, local_folder, read_bytes, read_json, remove, write_json
from model.config import AlitConfig

Figures = dict[str, float | int | str]

MANIFEST = "artifact.json"
DRAFTS = ".drafts"
SEEN = "seen."  # a figure with this before its name is a fact of the fingerprint, as the stage found it
UNREADABLE = "unreadable"  # figure of an artifact that lacks so many inputs which a later run may be allowed to read
TOKENIZER_FILES = ("config.json", "weights.safetensors")

IMAGES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # hash of source-relative path and content
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.string()),  # null when the source has none
        pa.field("width", pa.int32(), nullable=False),  # of the original, px, after EXIF orientation
        pa.field("height", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train | val
        pa.field("image", pa.binary(), nullable=False),  # PNG (lossless), RGB, at the working size
        pa.field("depth", pa.binary()),  # 16-bit grayscale PNG over the image's pixels: millimetres, 0 = no reading
        pa.field("mask", pa.binary()),  # 8-bit grayscale PNG over the image's pixels: class ids
        pa.field("complexity", pa.float64()),  # people's score, in any unit; null when the source has none
    ]
)
REJECTED_SCHEMA = pa.schema(
    [pa.field("uri", pa.string(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)
COUNTS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("value", pa.float32()),  # the rule's metric at the chosen count
        pa.field("satisfied", pa.bool_(), nullable=False),
    ]
)


class WorkspaceError(RuntimeError):
    """A run can't begin, or can't go on, in its workspace: somebody else's, no Ray, too small a Ray, no record."""

    trace: str = ""  # file with the whole of it, where the message is not all there is to say


@dataclass(frozen=True)
class Manifest:
    """What ``artifact.json`` says of a finished artifact."""

    schema: str
    version: int
    stage: str
    key: str
    inputs: dict[str, str]  # argument name -> key of the artifact that was read
    config: dict[str, Any]
    counts: Figures
    code: str = "1"  # version of the stage's code
    fingerprint: dict[str, Any] = field(default_factory=dict)  # facts of the outside world that are in the key
    files: str = ""  # digest of the names of the table's files
    mlflow_run_id: str | None = None
    seconds: float = 0.0
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def digest_of(folder: Path, names: Sequence[str]) -> str:
    """sha256 over the named files of a folder."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A finished folder; ``uri`` is where it stands, ``key`` what it was made from."""

    uri: str
    key: str
    schema: ClassVar[str] = "artifact"
    version: ClassVar[int] = 1
    follows_images: ClassVar[bool] = False  # the table's files are those of an ImageSet, row by row

    @classmethod
    def open(cls, uri: str) -> Self:
        """The artifact at ``uri``; raises FileNotFoundError, or ValueError for another kind or a newer version."""
        manifest = read_manifest(uri)
        if manifest is None:
            raise FileNotFoundError(f"{uri}: no {MANIFEST} here, so no finished {cls.schema}")
        if manifest.schema != cls.schema:
            raise ValueError(f"{uri}: this is a {manifest.schema!r} artifact, a {cls.schema!r} is needed")
        if manifest.version > cls.version:
            raise ValueError(f"{uri}: {cls.schema} version {manifest.version}; this software reads up to {cls.version}")
        return cls(uri=uri, key=manifest.key)

    @property
    def manifest(self) -> Manifest:
        """The parsed ``artifact.json``."""
        manifest = read_manifest(self.uri)
        if manifest is None:
            raise FileNotFoundError(f"{self.uri}: {MANIFEST} is gone")
        return manifest

    @property
    def table_uri(self) -> str:
        """The folder of the artifact's main Parquet table."""
        return join(self.uri, "table")


@dataclass(frozen=True)
class ImageSet(Artifact):
    """``table``: IMAGES_SCHEMA; ``rejected``: REJECTED_SCHEMA; ``listing``: what the source held.

    Files are named by what is in them (components/parts.py); ``parts`` counts each, and ``added.json`` names those of
    ``table`` whose images were decoded when this was made: {"parts": [name, …]}.
    """

    schema: ClassVar[str] = "image_set"
    version: ClassVar[int] = 3

    @property
    def rejected_uri(self) -> str:
        """The folder of the table of images that could not be read."""
        return join(self.uri, "rejected")


@dataclass(frozen=True)
class GridSet(ImageSet):
    """``table``: image_id, split and image of an ImageSet, and ``grid``: what a base makes of the image, features
    float32 [E * h * w] in that order; files as the ImageSet's. ``base.json``: the digest of the base.
    """

    schema: ClassVar[str] = "grid_set"
    version: ClassVar[int] = 1
    follows_images: ClassVar[bool] = True
    column: ClassVar[str] = "grid"

    @property
    def grid_bytes(self) -> int:
        """Of one image."""
        store, path = filesystem(self.table_uri)
        schema = pq.read_schema(store.get_file_info(fs.FileSelector(path))[0].path, filesystem=store)
        return 4 * int(schema.field(self.column).type.list_size)


@dataclass(frozen=True)
class _Weights(Artifact):
    """``weights.safetensors`` and ``config.json``."""

    def digest(self) -> str:
        """sha256 of both files: the same for what was trained here and a copy from the model registry."""
        with local_folder(self.uri) as folder:
            return digest_of(Path(folder), TOKENIZER_FILES)


@dataclass(frozen=True)
class BaseTokenizer(_Weights):
    """``weights.safetensors`` and ``config.json`` of the 2D base tokenizer."""

    schema: ClassVar[str] = "base_tokenizer"


@dataclass(frozen=True)
class Tokenizer(_Weights):
    """``weights.safetensors`` and ``config.json`` of the whole adaptive tokenizer, its base included."""

    schema: ClassVar[str] = "tokenizer"


@dataclass(frozen=True)
class Judge(Artifact):
    """A model that answers a task for an image."""

    schema: ClassVar[str] = "judge"


@dataclass(frozen=True)
class CodeBook(Artifact):
    """``table``: image_id, codes: those of every budget, one after the other, flat (float16 when continuous).

    Files are called as the ImageSet's, and have its rows. ``budgets.json``: the budgets; ``tokenizer.json``: the digest
    of the tokenizer.
    """

    schema: ClassVar[str] = "code_book"
    follows_images: ClassVar[bool] = True
    version: ClassVar[int] = 2


@dataclass(frozen=True)
class ScoreTable(Artifact):
    """``table``: image_id, split and, per metric, a list with one float32 per budget; files as the ImageSet's."""

    schema: ClassVar[str] = "score_table"
    follows_images: ClassVar[bool] = True
    version: ClassVar[int] = 2


@dataclass(frozen=True)
class LengthModel(Artifact):
    """``head``: a LengthHead; ``table``: image_id, predicted (a float32 per budget), files as the score table's."""

    schema: ClassVar[str] = "length_model"
    follows_images: ClassVar[bool] = True


@dataclass(frozen=True)
class TokenCounts(Artifact):
    """``table``: COUNTS_SCHEMA; ``rules.json``: what each rule of the task comes to, the chosen one first."""

    schema: ClassVar[str] = "token_counts"
    follows_images: ClassVar[bool] = True


@dataclass(frozen=True)
class TokenArchive(Artifact):
    """``table``: image_id, num_tokens, token_ids; ``tokenizer.json``: the tokenizer's digest and where it stood."""

    schema: ClassVar[str] = "token_archive"
    follows_images: ClassVar[bool] = True


@dataclass(frozen=True)
class Analysis(Artifact):
    """Findings over the whole set: JSON for a program, ``table`` for a person, PNG pictures."""

    schema: ClassVar[str] = "analysis"


@dataclass(frozen=True)
class Report(Artifact):
    """``report.html``: one page that needs nothing beside it."""

    schema: ClassVar[str] = "report"


@dataclass(frozen=True)
class Publication(Artifact):
    """``publication.json``: the registered model's name and version, the runs, the tables."""

    schema: ClassVar[str] = "publication"


def archive_header(tokenizer_uri: str) -> dict[str, Any]:
    """What an archive says of its tokenizer: the digest of its weights, its codebook and where it stood."""
    weights = read_bytes(join(tokenizer_uri, "weights.safetensors"))
    config = read_json(join(tokenizer_uri, "config.json"))["config"]
    size, width = config["codebook_size"], AlitConfig.from_dict(config).channels_per_latent
    return {
        "digest": hashlib.sha256(weights).hexdigest(),
        "uri": tokenizer_uri,
        "codebook_size": size,
        "latent_dim": width,
        "image_size": config["image_size"],
        "budgets": config["budgets"],
        "bits_per_token": ceil(log2(size)) if size else 16 * width,
    }


def read_manifest(uri: str) -> Manifest | None:
    """The manifest of the artifact at ``uri``, or None when none is finished there."""
    try:
        return Manifest(**read_json(join(uri, MANIFEST)))
    except FileNotFoundError:
        return None


def finished(workspace: str, stage: str) -> Iterator[tuple[str, Manifest]]:
    """URI and manifest of every artifact of ``stage`` that stands, the newest first; none without a workspace."""
    if not workspace:
        return
    store, path = filesystem(join(workspace, stage))
    folders = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
    files = store.get_file_info([f"{folder.path}/{MANIFEST}" for folder in folders])
    for file in sorted(files, key=lambda file: (file.mtime_ns or 0, file.path), reverse=True):
        uri = join(workspace, stage, file.path.split("/")[-2])
        manifest = read_manifest(uri) if file.is_file else None
        if manifest is not None:
            yield uri, manifest


class Draft:
    """The folder a stage writes into before its artifact is real."""

    def __init__(self, workspace: str, stage: str, key: str) -> None:
        self.final = join(workspace, stage, key)
        self.uri = join(workspace, DRAFTS, f"{stage}-{key}-{uuid.uuid4().hex[:8]}")
        store, path = filesystem(self.uri)
        store.create_dir(path, recursive=True)

    def commit(
        self, manifest: Manifest, *, replaces: Manifest | None = None, check: Callable[[], None] = lambda: None
    ) -> str:
        """Make the artifact real and return its URI.

        What stands under the key and is not ``replaces`` was finished by another run meanwhile: it stays, and the draft
        goes. Locally one rename moves folder and manifest together. In a bucket an older manifest goes first and the
        new one comes last, so what is between is no artifact; S3 copies by itself, large objects in parts. ``check`` is
        called before what others see is changed, and raises to prevent it. Raises FileNotFoundError when the draft was
        swept away.
        """
        standing = read_manifest(self.final)
        if standing is not None and standing != replaces:
            self.discard()
            return self.final
        if not exists(self.uri):
            raise FileNotFoundError(f"{self.uri}: the draft is gone; another run has swept it away")
        write_json(join(self.uri, MANIFEST), asdict(manifest))
        check()
        store, path = filesystem(self.uri)
        _, final = filesystem(self.final)
        if not isinstance(store, fs.LocalFileSystem):
            self._copy(check)
            return self.final
        remove(self.final)
        store.create_dir(final.rsplit("/", 1)[0], recursive=True)
        store.move(path, final)
        return self.final

    def _copy(self, check: Callable[[], None]) -> None:
        store, path = filesystem(self.uri)
        _, final = filesystem(self.final)
        if exists(join(self.final, MANIFEST)):
            store.delete_file(f"{final}/{MANIFEST}")
        remove(self.final)
        infos = store.get_file_info(fs.FileSelector(path, recursive=True))
        names = [info.path.removeprefix(path) for info in infos if info.is_file]
        buckets.copy({path + name: final + name for name in names if name != f"/{MANIFEST}"})
        check()
        buckets.copy({f"{path}/{MANIFEST}": f"{final}/{MANIFEST}"})
        store.delete_dir(path)

    def discard(self) -> None:
        """Delete what was written."""
        remove(self.uri)


def silent(_: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Job:
    """What the runner hands a stage besides its config and inputs."""

    stage: str
    key: str
    workspace: str
    output: str  # the draft's folder: write the artifact's files here
    scratch: str  # kept between runs of the same key: training checkpoints
    code: str = "1"  # version of the stage's code
    fresh: bool = False  # forced: nothing of earlier artifacts may be taken over
    tracking: Mapping[str, str] = field(default_factory=dict)  # components.tracking.Tracker's fields
    progress: Callable[[str], None] = silent  # one short line for the person at the terminal
