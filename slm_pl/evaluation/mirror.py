"""A mirror of the data that evaluation needs, made on a connected machine for one without network."""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slm_pl import files
from slm_pl.console import progress
from slm_pl.data.named_corpora import CORPORA, Corpus, hub_rows
from slm_pl.errors import UsageError
from slm_pl.evaluation._surroundings import quiet
from slm_pl.evaluation.harness import TaskFile, task_files

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "SOURCES.json"
"""Where each file of a mirror comes from."""


@dataclass(frozen=True)
class MirroredFile:
    """One file of a mirror.

    Args:
        path: Relative to the mirror.
        source: Hub id, with the configuration if there is one.
        split: Of the data set.
        revision: The data set's commit or branch on the hub, where it is known.
        rows: Lines.
        sha256: Of the file.
    """

    path: str
    source: str
    split: str
    revision: str | None
    rows: int
    sha256: str


@dataclass(frozen=True)
class Mirror:
    """What a call left in the mirror.

    Args:
        written: New files.
        there: Tasks and texts that were there already.
        failed: Reason by name of what could not be fetched.
    """

    written: list[MirroredFile]
    there: list[str]
    failed: dict[str, str]


def make_mirror(
    output: str | os.PathLike[str], tasks: Sequence[str] = (), texts: Sequence[str] = (), overwrite: bool = False
) -> Mirror:
    """Fetches data sets from the hub and writes ``<output>/<name>/<split>.jsonl``, for ``local_data`` elsewhere.

    A task or text is fetched whole or not at all, and one that fails does not stop the others.

    Args:
        output: The mirror; what it holds already stays.
        tasks: Names of tasks, groups and tags of lm-eval, or paths of task files.
        texts: Names of corpora, see :data:`~slm_pl.data.named_corpora.CORPORA`.
        overwrite: Fetch again what is there.

    Returns:
        What was written, was there, and failed.

    Raises:
        UsageError: If a name is unknown, or the directory cannot be written.
    """
    unknown = [name for name in texts if name not in CORPORA]
    if unknown:
        raise UsageError(f"There is no text named {', '.join(unknown)}; allowed are {', '.join(CORPORA)}.")
    output = Path(output)
    files.make_directory(output)
    with quiet():
        found = task_files(tasks)
        both = [name for name in texts if name in found]
        if both:
            raise UsageError(f"{both[0]} is a task and a text, and both would be one directory. Mirror them apart.")
        work: dict[str, tuple[set[str], Callable[[set[str]], dict[str, _Rows]]]] = {}
        for name, file in found.items():
            work[name] = set(file.splits().values()), functools.partial(_task_splits, file)
        for name in texts:
            work[name] = {CORPORA[name].split}, functools.partial(_text_split, CORPORA[name])
        result = Mirror([], [], {})
        with progress("Mirror", len(work)) as advance:
            for name, (splits, fetch) in work.items():
                wanted = {one for one in splits if overwrite or not (output / name / f"{one}.jsonl").is_file()}
                if splits and not wanted:
                    result.there.append(name)
                else:
                    try:
                        result.written.extend(_write(output, name, fetch(wanted)))
                        _write_manifest(output, result.written)
                    except Exception as error:
                        result.failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
                advance(name)
    return result


@dataclass(frozen=True)
class _Rows:
    """The rows of a split, and where they are from."""

    source: str
    rows: "Dataset | list[dict[str, str]]"
    revision: str | None = None


def _task_splits(file: TaskFile, wanted: set[str]) -> dict[str, _Rows]:
    import datasets

    if file.own_data:
        raise UsageError("the task makes its data with its own program, which a mirror cannot hold")
    path, name = file.config.get("dataset_path"), file.config.get("dataset_name")
    options = dict(file.config.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)  # of scripts, which the library no longer runs
    source = "/".join(str(part) for part in (path, name) if part)
    found = {}
    for split in sorted(wanted):
        rows = datasets.load_dataset(path, name, split=split, **options)
        found[split] = _Rows(source, rows, _revision(rows))
    return found


def _text_split(corpus: Corpus, wanted: set[str]) -> dict[str, _Rows]:
    rows = [{corpus.column: text} for text in hub_rows(corpus)]
    return {corpus.split: _Rows("/".join(part for part in (corpus.hub, corpus.name) if part), rows, corpus.revision)}


def _write(output: Path, name: str, splits: Mapping[str, _Rows]) -> list[MirroredFile]:
    """Writes all splits under hidden names before the first takes its place."""
    written: list[MirroredFile] = []
    files.make_directory(output / name)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}.") as folder:
        for split, found in splits.items():
            digest = hashlib.sha256()
            with (Path(folder) / split).open("wb") as file:
                for row in found.rows:
                    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                    digest.update(line)
                    file.write(line)
            place = f"{name}/{split}.jsonl"
            written.append(
                MirroredFile(place, found.source, split, found.revision, len(found.rows), digest.hexdigest())
            )
        for one in written:
            os.replace(Path(folder) / one.split, output / one.path)
    return written


def _revision(rows: "Dataset") -> str | None:
    """The commit that the library fetched from: it stands in the addresses of the files."""
    addresses: Iterable[str] = rows.info.download_checksums or ()
    found = {match.group(1) for address in addresses if (match := re.search(r"@([0-9a-f]{40})/", address))}
    return found.pop() if len(found) == 1 else None


def _write_manifest(output: Path, written: Iterable[MirroredFile]) -> None:
    path = output / MANIFEST
    try:
        known = {one["path"]: one for one in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    known |= {one.path: asdict(one) for one in written}
    files.write_text(path, json.dumps([known[key] for key in sorted(known)], indent=1) + "\n")
