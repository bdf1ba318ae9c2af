"""Tar shards as webdataset writes them: members with the same name up to the first dot are one sample.

Of a sample count: the image (``.jpg``, ``.png``, … as for folders), ``.cls`` (the label as text), ``.json`` (its
"label" where there is no ``.cls``, and its "split"), ``.depth.png`` and ``.mask.png`` (as a manifest's). Other members,
captions in ``.txt`` among them, are ignored. The first folder of a shard's path may name the split.
"""

import json
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Self, TypeVar

from components.sources import SPLITS, TAR, SourceObject, Targets, complexity_of, listing_digest
from components.sources.folder import SUFFIXES
from components.sources.places import File, Place, files_of, stream

IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
DEPTH, MASK, LABEL, FACTS = "depth.png", "mask.png", "cls", "json"
BUFFER_BYTES = 4 << 20  # read at once while a shard's headers are looked for; larger members are skipped
SHARDS_AHEAD = 8  # whose headers are read at once
MAX_TEXT = 1 << 20  # bytes of a label or of JSON

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class TarSource:
    """The samples of ``shards``, which lie in ``place``. Listing reads headers and labels; an image is read by itself.

    The digest is that of the shards, so planning reads none of them. The index of :data:`SHARDS_AHEAD` shards is in
    memory at a time. A shard that is damaged, or changes before it is read, is an error that names it.
    """

    place: Place
    shards: tuple[File, ...]
    limit: int | None = None

    @classmethod
    def open(cls, source: str, *, limit: int | None = None) -> Self:
        """A folder of shards, one shard, or a pattern of them; raises ValueError when there is none."""
        place, shards = files_of(source, TAR)
        return cls(place, tuple(shards), limit)

    def list(self) -> Iterator[SourceObject]:
        """Every sample that has an image, sorted by path; raises ValueError for a damaged shard and for no sample."""
        samples = chain.from_iterable(ahead(self._index, self.shards, SHARDS_AHEAD))
        found = False
        for sample in islice(samples, self.limit):
            found = True
            yield sample
        if not found:
            raise ValueError(f"data.source {self.place.uri(self.shards[0].path)!r}: no images in the shards")

    def digest(self, listed: str = "") -> str:
        """sha256 over the listing of the shards."""
        return listing_digest(SourceObject(file.path, file.size, file.etag) for file in self.shards)

    def read(self, path: str, etag: str = "") -> bytes:
        """One member; raises ChangedFile when its shard is no longer what was listed, or another OSError."""
        length, size, version, *spans = etag.split(" ")
        start, bytes_ = next(span for name, *span in map(_span, spans) if name == _parts(path)[1])
        return self.place.read_span(File(path[: int(length)], int(size), version), start, bytes_)

    def uri(self, path: str) -> str:
        """The shard's, then the member's name."""
        return self.place.uri(path)

    def _index(self, shard: File) -> Sequence[SourceObject]:
        try:
            with stream(self.place, shard, buffer_bytes=BUFFER_BYTES) as file:
                samples = [sample.listed(shard) for sample in _samples(file) if sample.image]
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ValueError(f"data.source {self.place.uri(shard.path)!r}: {error}") from error
        samples.sort(key=lambda sample: sample.path)
        for one, other in zip(samples, samples[1:], strict=False):
            if one.path == other.path:
                raise ValueError(f"data.source {self.place.uri(one.path)!r}: twice in its shard, once is allowed")
        return samples


@dataclass
class _Sample:
    """The members of a sample so far: name in the shard, first byte and size of each that is read later."""

    name: str
    members: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    label: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> str | None:
        """Which member is the image: where there are several, by the order of SUFFIXES."""
        return next((name for name in IMAGES if name in self.members), None)

    def listed(self, shard: File) -> SourceObject:
        """As the source lists it; the etag says where the members are, since reading one needs nothing else."""
        assert self.image is not None
        names = [name for name in (self.image, DEPTH, MASK) if name in self.members]
        paths = {name: f"{shard.path}/{self.members[name][0]}" for name in names}
        spans = [f"{name}={start}+{size}" for name in names for _, start, size in [self.members[name]]]
        label = self.label if self.label is not None else _label(self.facts, self.name)
        split, complexity = _split(self.facts, shard.path), _complexity(self.facts, self.name)
        targets = Targets(label, paths.get(DEPTH), paths.get(MASK), split, complexity)
        largest = max(self.members[name][2] for name in names)
        etag = " ".join([str(len(shard.path)), str(shard.size), shard.etag, *spans])
        return SourceObject(paths[self.image], largest, etag, targets)


def ahead(make: Callable[[Given], Made], items: Sequence[Given], count: int) -> Iterator[Made]:
    """``make`` of each item, in order, ``count`` of them at once."""
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[Made]] = deque()
        left = iter(items)
        try:
            while True:
                waiting.extend(pool.submit(make, item) for item in islice(left, count - len(waiting)))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _samples(file: Any) -> Iterator[_Sample]:
    sample: _Sample | None = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or a large shard's members would all stay in memory
            name = member.name.removeprefix("./")
            if not member.isfile() or member.issparse() or name.rpartition("/")[2].startswith("."):
                continue
            stem, kind = _parts(name)
            if sample is None or sample.name != stem:
                if sample is not None:
                    yield sample
                sample = _Sample(stem)
            if kind in (*IMAGES, DEPTH, MASK):
                if member.offset_data + member.size > file.seek(0, 2):
                    raise tarfile.ReadError(f"{name} ends beyond the end of the shard")
                sample.members[kind] = (name, member.offset_data, member.size)
            elif kind == LABEL:
                sample.label = _text(tar, member).strip() or None
            elif kind == FACTS:
                sample.facts = _facts(_text(tar, member), name)
    if sample is not None:
        yield sample


def _parts(path: str) -> tuple[str, str]:
    """A member's sample, and what it is of it: its name up to the first dot, and the rest in lower case."""
    folder, slash, name = path.rpartition("/")
    stem, _, kind = name.partition(".")
    return f"{folder}{slash}{stem}", kind.lower()


def _span(text: str) -> tuple[str, int, int]:
    found = re.fullmatch(r"([\w.]+)=(\d+)\+(\d+)", text)
    assert found is not None
    return found[1], int(found[2]), int(found[3])


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > MAX_TEXT:
        raise ValueError(f"{member.name}: {member.size} bytes; at most {MAX_TEXT} are allowed")
    content = tar.extractfile(member)
    assert content is not None
    try:
        return content.read().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{member.name}: UTF-8 is needed") from None


def _facts(text: str, name: str) -> Mapping[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    return facts if isinstance(facts, dict) else {}


def _label(facts: Mapping[str, Any], name: str) -> str | None:
    label = facts.get("label")
    if label is None or (isinstance(label, str | int) and not isinstance(label, bool)):
        return str(label) if label not in (None, "") else None
    raise ValueError(f"{name}.json: label = {label!r}: text or a whole number is needed")


def _complexity(facts: Mapping[str, Any], name: str) -> float | None:
    try:
        return complexity_of(facts.get("complexity"))
    except ValueError as error:
        raise ValueError(f"{name}.json: {error}") from None


def _split(facts: Mapping[str, Any], shard: str) -> str | None:
    return SPLITS.get(str(facts.get("split"))) or SPLITS.get(shard.partition("/")[0])
