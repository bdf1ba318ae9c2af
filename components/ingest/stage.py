"""The stage: what an earlier ImageSet has is linked; files that are new or have changed are decoded.

The listing is compared with that of the newest ImageSet of the same config as both stream by; files that there was no
access to count as changed, for an ETag says nothing of access. What is not reused is written down first, in blocks of
``files_per_block`` files; then every block, and every earlier part that loses rows, is one task's. Rows keep the order
of the listing within a run; later runs add theirs at the end.
"""

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from components.artifacts import REJECTED_SCHEMA, SEEN, UNREADABLE, Figures, ImageSet, Job, finished
from components.config import IngestResources, IngestStageConfig
from components.ingest.decode import Shrunk, Work, make_parts, unreadable
from components.ingest.listing import Changes, Numbering, merge, read_again, read_listing, sort_out, write_blocks
from components.ingest.tally import PARTS_SCHEMA, Tally, figures_of
from components.parts import link_files, remove_others
from components.sources import Listing, Source, open_source
from components.store import join, read_table, remove, write_json, write_table

PROGRESS_S = 2.0
FILES = {"file": "table", "rejects": "rejected"}  # column of PARTS_SCHEMA -> the folder of its files


def ingest(job: Job, *, config: IngestStageConfig, resources: IngestResources) -> Figures:
    """Write ``listing``, ``table`` (IMAGES_SCHEMA), ``rejected`` (REJECTED_SCHEMA) and ``parts`` under ``job.output``.

    Figures of all images: images, rejected, train, val, labels (different ones), bytes (of the stored images), depth
    and mask (images that have them), unreadable (rejected for want of access). Of the listing beside that of the
    ImageSet which parts are taken from: added, changed, removed, reused (files); and seen.listing, its digest, which
    may be another than when the run was planned. Raises ValueError when the source can't be listed, holds no good
    image, or more than ``config.limits.max_rejected`` of the files that this run reads are bad.
    """
    source, base = open_source(config.data), _Base.find(job, config)
    changes = _compare(source, base, job.output, resources.files_per_block)
    job.progress(_told(changes))
    loses = pc.is_in(base.parts["part"], value_set=pa.array(list(changes.gone), pa.int32()))
    kept, losing = base.parts.filter(pc.invert(loses)), base.parts.filter(loses)
    for column, table in FILES.items():
        if names := [name for name in kept[column].to_pylist() if name]:
            link_files(join(base.uri, table), join(job.output, table), names)
    shrunk = [Shrunk(Tally.of_row(row), bytes(changes.gone[row["part"]])) for row in losing.to_pylist()]
    work = Work(source, config, job.output, base.next_part, base.uri, shrunk)
    made = _make(job, work, -(-changes.to_decode // resources.files_per_block), changes, resources)
    remove(join(job.output, "blocks"))
    parts = pa.concat_tables([kept, pa.Table.from_pylist([one.row() for one in made], PARTS_SCHEMA)]).sort_by("part")
    figures = figures_of(parts)
    if not figures["images"]:
        reasons = [reason for one in made for reason in one.reasons]
        raise ValueError(f"data.source {config.data.source!r}: no good image in it: {'; '.join(reasons[:3])}")
    _describe(job.output, parts, [one.file for one in made if one.part >= work.first and one.file])
    job.progress(f"{figures['images']} images, {figures['rejected']} rejected")
    figures |= {name: getattr(changes, name) for name in ("added", "changed", "removed", "reused")}
    return figures | {UNREADABLE: sum(1 for _ in unreadable(job.output)), f"{SEEN}listing": changes.listing}


@dataclass(frozen=True)
class _Base:
    """The ImageSet that parts are taken from, or none."""

    uri: str
    parts: pa.Table  # PARTS_SCHEMA

    @classmethod
    def find(cls, job: Job, config: IngestStageConfig) -> "_Base":
        """The newest in the workspace that the same code made with a config of the same effect on an image.

        There is none for a forced stage.
        """
        same = (ImageSet.version, job.code, _decisive(config.model_dump(mode="json")))
        for uri, found in () if job.fresh else finished(job.workspace, job.stage):
            if (found.version, found.code) == same[:2] and _decisive(found.config) == same[2]:
                return cls(uri, read_table(join(uri, "parts")).cast(PARTS_SCHEMA))
        return cls("", PARTS_SCHEMA.empty_table())

    @property
    def next_part(self) -> int:
        """Above every number there is."""
        highest = pc.max(self.parts["part"]).as_py()
        return 0 if highest is None else highest + 1


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without the limit that decides whether a run fails, and not what it makes."""
    return {**config, "limits": {name: value for name, value in config["limits"].items() if name != "max_rejected"}}


def _compare(source: Source, base: _Base, output: str, files_per_block: int) -> Changes:
    """Write the listing and the blocks to decode below ``output``."""
    changes, numbering = Changes(), Numbering(base.next_part, files_per_block)
    listing = Listing(source.list())
    merged = merge(read_listing(join(base.uri, "listing")) if base.uri else iter(()), iter(listing))
    merged = read_again(merged, source, set(unreadable(base.uri)) if base.uri else set())
    objects = sort_out(merged, source, numbering, join(output, "listing"), changes)
    write_blocks(objects, join(output, "blocks"), files_per_block=files_per_block)
    changes.listing = source.digest(listing.digest())
    return changes


def _told(changes: Changes) -> str:
    files = changes.reused + changes.to_decode
    if not changes.reused:
        return f"{files} files listed"
    return f"{files} files listed: {changes.added} new, {changes.changed} changed, {changes.removed} removed"


def _make(job: Job, work: Work, num_blocks: int, changes: Changes, resources: IngestResources) -> list[Tally]:
    """Every part that is made in this run; raises ValueError for too many bad files among those that are read."""
    made, read, told = [], Tally(), time.monotonic()
    limit = work.config.limits.max_rejected
    with closing(make_parts(work, num_blocks, changes.bytes_to_decode, resources)) as tallies:
        for tally in tallies:
            made.append(tally)
            if tally.part >= work.first:
                read.add(tally)
                _check_rejected(read, limit)
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                done = read.images + read.rejected
                job.progress(f"{done}/{changes.to_decode} files, {read.rejected} rejected")
    return made


def _check_rejected(read: Tally, limit: int) -> None:
    if read.rejected > limit:
        seen = read.images + read.rejected
        told = "; ".join(read.reasons)
        raise ValueError(
            f"{read.rejected} of the {seen} files read so far are bad, ingest.max_rejected allows {limit}: {told}"
        )


def _describe(output: str, parts: pa.Table, decoded: Iterable[str]) -> None:
    """What is said of the parts; what no part has is deleted."""
    write_table(join(output, "parts"), parts)
    write_json(join(output, "added.json"), {"parts": sorted(decoded)})
    for column, table in FILES.items():
        remove_others(join(output, table), parts[column].to_pylist())
    if not any(parts["rejects"].to_pylist()):
        write_table(join(output, "rejected"), REJECTED_SCHEMA.empty_table())  # it is there, and empty
