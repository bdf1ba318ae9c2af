"""The Parquet files of a table, what their names say, and what of an earlier table can be taken over.

``part-000012-<rows>.parquet`` is a block of images as it was decoded; ``<rows>`` hashes its rows, so an equal name
means equal rows. Where some of them have gone since, what is left is ``part-000012-<rows>-<kept>.parquet``; the first
three words are its *root*. Every table that is made of an ImageSet has files of the same names with the same rows.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel

from components import buckets
from components.artifacts import Job, finished
from components.store import exists, filesystem, join, read_json

SUFFIX = ".parquet"
HEX = 16  # digits of a hash in a name
THREADS = 16  # for small files, of which a bucket keeps one waiting
LOOK_BACK = 32  # earlier tables that are looked at: each took over what those before it had


def part_name(number: int, rows: Iterable[Mapping[str, Any]]) -> str:
    """Name of the file of a block with these rows."""
    digest = hashlib.sha256()
    for row in rows:
        for value in row.values():
            data = value if isinstance(value, bytes) else repr(value).encode()
            digest.update(b"%d:%b" % (len(data), data))
    return f"part-{number:06d}-{digest.hexdigest()[:HEX]}{SUFFIX}"


def kept_name(name: str, ids: Iterable[str]) -> str:
    """Name of what is left of the file ``name``: the rows with ``ids``."""
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    return f"{root_of(name)}-{digest[:HEX]}{SUFFIX}"


def root_of(name: str) -> str:
    """The block that a file's rows come from; the name itself where it isn't one of :func:`part_name`."""
    return "-".join(name.removesuffix(SUFFIX).split("-")[:3])


def part_names(uri: str) -> list[str]:
    """Names of the Parquet files in folder ``uri``, sorted; none where there is no folder."""
    store, path = filesystem(uri)
    infos = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.base_name.endswith(SUFFIX))


def files_digest(uri: str) -> str:
    """A hash of the names of the files in folder ``uri``: the same for tables of the same images in the same files."""
    return hashlib.sha256("\n".join(part_names(uri)).encode()).hexdigest()[:HEX]


def link_files(source: str, target: str, names: Sequence[str]) -> None:
    """The files ``names`` of folder ``source`` in the folder ``target`` too, which goes on without ``source``.

    On a local disk they are hard links, or copies where it has none; in a bucket S3 copies by itself. Raises OSError.
    """
    store, origin = filesystem(source)
    _, folder = filesystem(target)
    store.create_dir(folder, recursive=True)
    if not isinstance(store, fs.LocalFileSystem):
        buckets.copy({f"{origin}/{name}": f"{folder}/{name}" for name in names})
        return
    for name in names:
        try:
            os.link(f"{origin}/{name}", f"{folder}/{name}")
        except FileExistsError:  # from an earlier try of the same task
            continue
        except OSError:  # too many links, or a disk that has none; where the file itself is at fault copying says so
            partial = f"{folder}/{name}.part"
            shutil.copyfile(f"{origin}/{name}", partial)
            os.replace(partial, f"{folder}/{name}")


def remove_others(uri: str, names: Iterable[str]) -> None:
    """Delete what is in folder ``uri`` besides ``names``: a task that ran twice may have left a file of other rows."""
    store, folder = filesystem(uri)
    wanted = set(names)
    for info in store.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        if info.is_file and info.base_name not in wanted:
            store.delete_file(info.path)


def count_rows(uri: str, names: Sequence[str]) -> int:
    """Rows of the files ``names`` of folder ``uri``, by their footers."""
    store, folder = filesystem(uri)

    def rows(name: str) -> int:
        with store.open_input_file(f"{folder}/{name}") as stream:
            return pq.read_metadata(stream).num_rows

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(rows, names))


@dataclass(frozen=True)
class Earlier:
    """The table of a finished artifact whose values are those that we would make of the same images."""

    table: str  # folder
    columns: Mapping[str, str]  # name there -> ours
    same: bool  # these are all its columns, in our order and by our names, so that its files can be ours


@dataclass(frozen=True)
class Taken:
    """Columns of a file of an earlier table that has all the images of one of ours."""

    file: str  # URI
    columns: Mapping[str, str]  # name there -> ours

    def read(self) -> pa.Table:
        """Those columns by our names, and image_id."""
        store, path = filesystem(self.file)
        table = pq.read_table(path, filesystem=store, columns=["image_id", *self.columns])
        return table.rename_columns(["image_id", *self.columns.values()])


@dataclass(frozen=True)
class Part:
    """A file of the target: what is taken over for it, and which columns must be made."""

    name: str
    taken: tuple[Taken, ...] = ()
    new: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """What becomes of each file of a target."""

    keys: tuple[str, ...] = ()  # columns of the target that are the images' own
    columns: tuple[str, ...] = ()  # and those that are made of them
    linked: Mapping[str, Sequence[str]] = field(default_factory=dict)  # earlier table -> its files that become ours
    parts: Sequence[Part] = ()  # the others

    @property
    def names(self) -> tuple[str, ...]:
        """Every column of the target, in order; of a mapping that takes nothing over, none."""
        return (*self.keys, *self.columns)

    @property
    def new(self) -> frozenset[str]:
        """Columns that must be made for some file."""
        return frozenset().union(*(part.new for part in self.parts))

    def groups(self) -> list[tuple[frozenset[str], list[Part]]]:
        """The parts by what must be made for them."""
        found: dict[frozenset[str], list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.new, []).append(part)
        return sorted(found.items(), key=lambda group: sorted(group[0]))


def earlier_by(job: Job, config: BaseModel, *, maker: str, digest: str, column: str) -> Iterator[Earlier]:
    """Tables with image_id and ``column`` that the same code and config made before, the newest first.

    Of those, the ones whose artifact has ``digest`` in its file ``maker``; none for a forced stage.
    """
    same = (job.code, config.model_dump(mode="json"))
    for uri, manifest in () if job.fresh else finished(job.workspace, job.stage):
        told = join(uri, maker)
        if (manifest.code, manifest.config) == same and exists(told) and read_json(told) == digest:
            yield Earlier(join(uri, "table"), {column: column}, same=True)


def plan_parts(
    images: str, columns: Sequence[str], earlier: Iterable[Earlier], *, keys: Sequence[str] = ("image_id",)
) -> Plan:
    """What of ``columns`` for the images in the table ``images`` stands in ``earlier`` tables, the newest first."""
    left = {root_of(name): name for name in part_names(images)}
    linked: dict[str, list[str]] = {}
    found: dict[str, list[tuple[Earlier, str]]] = {}
    for table in islice(earlier, LOOK_BACK):
        for name in part_names(table.table):
            ours = left.get(root_of(name))
            if ours == name and table.same:
                linked.setdefault(table.table, []).append(left.pop(root_of(name)))
            elif ours is not None:
                found.setdefault(ours, []).append((table, name))
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda name: _plan_part(images, name, columns, found.get(name, ())), left.values())
        return Plan(tuple(keys), tuple(columns), linked, tuple(parts))


def _plan_part(images: str, name: str, columns: Sequence[str], found: Sequence[tuple[Earlier, str]]) -> Part:
    taken, missing = [], set(columns)
    ids = read_part(images, name, ["image_id"]) if found else None
    for table, file in found:
        useful = {theirs: ours for theirs, ours in table.columns.items() if ours in missing}
        if useful and (file == name or _has(read_part(table.table, file, ["image_id"]), ids)):
            taken.append(Taken(f"{table.table}/{file}", useful))
            missing -= set(useful.values())
    return Part(name, tuple(taken), frozenset(missing))


def _has(table: pa.Table, ids: pa.Table) -> bool:
    return pc.index_in(ids["image_id"], value_set=table["image_id"].combine_chunks()).null_count == 0


def read_part(uri: str, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of the file ``name`` of folder ``uri``."""
    store, folder = filesystem(uri)
    return pq.read_table(f"{folder}/{name}", filesystem=store, columns=list(columns))


def completed(rows: pa.Table, taken: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    """``rows`` with what ``taken`` tables have for the same images, columns in the order ``names``; raises KeyError."""
    columns = {name: rows[name] for name in rows.column_names}
    for table in taken:
        at = pc.index_in(rows["image_id"], value_set=table["image_id"].combine_chunks())
        if at.null_count:
            raise KeyError(f"{at.null_count} of {len(rows)} images are not in an earlier table that had them all")
        columns |= {name: table[name].take(at) for name in table.column_names if name != "image_id"}
    return pa.table({name: columns[name] for name in names or columns})
