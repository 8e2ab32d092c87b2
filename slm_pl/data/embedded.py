"""English text that every CPython brings along: a corpus and an instruction set without a download.

Two sources, read from the running interpreter:

* ``pydoc_data.topics``: the chapters of the language reference behind ``help("topic")`` (prose, about 460 kB);
* the docstrings of public functions and methods of the standard library, read from its source with :mod:`ast` (no
  module of the list is imported, nothing is executed).

Both differ a little between Python versions, so :func:`fingerprint` belongs into every record of a result.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib.abc import InspectLoader
from importlib.machinery import PathFinder
from inspect import cleandoc
from typing import Literal, TypedDict

from slm_pl.errors import UsageError

TopicSplit = Literal["calibration", "train", "heldout"]
RowSplit = Literal["train", "heldout"]

_TOPIC_SALT = "17"
_RUN_WORDS, _RUN_CHARACTERS, _PARAGRAPH_CHARACTERS = 12, 60, 80
_DOCSTRING_CHARACTERS = 40
_SUMMARY_WORDS = 5

# Modules whose docstrings are prose. A module that this Python lacks is skipped.
_MODULES = """
abc argparse ast asyncio.base_events asyncio.events asyncio.futures asyncio.locks asyncio.protocols asyncio.queues
asyncio.runners asyncio.streams asyncio.subprocess asyncio.tasks asyncio.transports base64 bdb bisect bz2 calendar
cgitb cmd code codecs codeop collections compileall concurrent.futures._base concurrent.futures.process configparser
contextlib copy csv dataclasses difflib dis distutils.util doctest email.charset email.generator email.header
email.headerregistry email.message email.parser email.policy email.utils enum filecmp fileinput fnmatch fractions
ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client
http.cookiejar http.cookies http.server imaplib importlib.abc importlib.metadata importlib.util inspect ipaddress json
json.decoder json.encoder linecache locale logging logging.config logging.handlers lzma mailbox mimetypes modulefinder
multiprocessing.connection multiprocessing.context multiprocessing.managers multiprocessing.pool
multiprocessing.shared_memory netrc nntplib numbers operator optparse os pathlib pdb pickle pickletools pkgutil
platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri random reprlib
rlcompleter runpy sched secrets selectors shelve shlex shutil smtpd smtplib socket socketserver ssl statistics string
subprocess symtable sysconfig tabnanny tarfile telnetlib tempfile textwrap threading timeit tokenize trace traceback
tracemalloc turtle types typing unittest.async_case unittest.case unittest.loader unittest.mock unittest.result
unittest.suite urllib.parse urllib.request urllib.robotparser uuid venv warnings weakref webbrowser wsgiref.handlers
wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate xml.dom.minidom xml.etree.ElementTree xml.sax
xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile zipimport
""".split()  # noqa: SIM905 - a literal would take two hundred lines


class DocstringChoice(TypedDict):
    """One question "which function does this text describe?" with four answers."""

    description: str
    choices: list[str]
    label: int


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _paragraphs(text: str) -> set[str]:
    """Paragraphs long enough to be recognised again, with white space normalised."""
    found = (_one_line(piece) for piece in re.split(r"\n[ \t]*\n", text))
    return {paragraph for paragraph in found if len(paragraph) >= _PARAGRAPH_CHARACTERS}


def _word_runs(text: str) -> set[str]:
    """Every run of twelve words: they also show text that is shared in the middle of a paragraph."""
    words = text.split()
    runs = (" ".join(words[start : start + _RUN_WORDS]) for start in range(len(words) - _RUN_WORDS + 1))
    return {run for run in runs if len(run) >= _RUN_CHARACTERS}


@lru_cache(maxsize=1)
def _topics_by_split() -> dict[TopicSplit, tuple[str, ...]]:
    """Names of the topics of each split; see :func:`topic_texts` for the rule."""
    topics = _topics()
    group = {name: name for name in topics}

    def first_of(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    owner: dict[str, str] = {}
    for name, text in topics.items():
        for piece in _paragraphs(text) | _word_runs(text):
            low, high = sorted((first_of(owner.setdefault(piece, name)), first_of(name)))
            group[high] = low

    splits: dict[TopicSplit, list[str]] = {"calibration": [], "train": [], "heldout": []}
    for name in topics:
        bucket = _digest(f"{_TOPIC_SALT}:{first_of(name)}") % 10
        splits["calibration" if bucket < 4 else "train" if bucket < 7 else "heldout"].append(name)
    return {split: tuple(names) for split, names in splits.items()}


@lru_cache(maxsize=1)
def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "The embedded text was asked for, but this Python comes without `pydoc_data`. "
            "Use a complete CPython, or give a text of your own (.txt, .jsonl, .parquet, or a Hub id) as source."
        ) from error
    return dict(sorted(topics.items()))


def topic_texts(split: TopicSplit) -> list[str]:
    """Texts of ``pydoc_data.topics``, in the order of their names.

    Topics quote each other at length ("specialnames" contains "customization"), so the unit of the split is a group of
    topics: two topics that share a paragraph of 80 characters or more, or a run of twelve words, are in one group. A
    group named after its alphabetically first topic goes to ``calibration`` if
    ``sha256("17:" + name) % 10`` is below 4, to ``train`` if it is below 7, else to ``heldout``. The salt 17 was
    chosen once, on Python 3.11, for usable sizes.

    Args:
        split: ``calibration`` (what methods look at), ``train``, or ``heldout`` (perplexity).

    Returns:
        One text per topic. No paragraph of 80 characters or more occurs in two splits.

    Raises:
        UsageError: This Python was built without ``pydoc_data``.
    """
    return [_topics()[name] for name in _topics_by_split()[split]]


def _source_of(module: str) -> str | None:
    """Source text of a standard-library module, without importing it or its packages."""
    path: list[str] | None = [sysconfig.get_path("stdlib")]  # not sys.path: a user's file may have the same name
    parts = module.split(".")
    for depth in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if depth < len(parts) - 1 and path is None:
            return None
    assert spec is not None
    return spec.loader.get_source(module) if isinstance(spec.loader, InspectLoader) else None


def _public_functions(module: str, source: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Top-level functions and methods of top-level classes, with qualified names."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.parse(source).body:
        if isinstance(node, functions) and not node.name.startswith("_"):
            yield f"{module}.{node.name}", node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, functions) and not member.name.startswith("_"):
                    yield f"{module}.{node.name}.{member.name}", member


@lru_cache(maxsize=1)
def _docstrings() -> dict[str, str]:
    """All cleaned docstrings by qualified name, each text once, in the order of the list and of the source."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for module in _MODULES:
        source = _source_of(module)
        if source is None:
            continue
        for name, node in _public_functions(module, source):
            raw = ast.get_docstring(node, clean=False)
            text = cleandoc(raw) if raw else ""
            if len(text) >= _DOCSTRING_CHARACTERS and name not in found and _one_line(text) not in seen:
                seen.add(_one_line(text))
                found[name] = text
    return found


@lru_cache(maxsize=2)
def _docstrings_of(split: RowSplit) -> dict[str, str]:
    """The docstrings of one split; see :func:`docstring_rows` for the rules."""
    rows = {name: text for name, text in _docstrings().items() if (_digest(name) % 5 == 0) == (split == "heldout")}
    if split == "heldout":
        return rows
    forbidden = set().union(*(_paragraphs(text) for text in topic_texts("heldout")))
    return {name: text for name, text in rows.items() if not _paragraphs(text) & forbidden}


def docstring_rows(split: RowSplit) -> list[dict[str, str]]:
    """Instruction rows in Alpaca's columns: "Describe `shutil.copytree`." and its docstring.

    Public functions and public methods of public classes, in the order of the module list and of the source. A
    docstring of fewer than 40 characters is left out, and one that was seen before (in either split). Training rows
    also leave out what shares a paragraph with a held-out topic.

    Args:
        split: ``heldout`` is where ``sha256(qualified name) % 5 == 0``, about a fifth.

    Returns:
        Dictionaries with ``instruction``, ``input`` (empty), ``output`` and ``name`` (the qualified name).
    """
    return [
        {"instruction": f"Describe `{name}`.", "input": "", "output": text, "name": name}
        for name, text in _docstrings_of(split).items()
    ]


def _summary(text: str) -> str:
    """First sentence of the first paragraph."""
    paragraph = _one_line(re.split(r"\n[ \t]*\n", text, maxsplit=1)[0])
    return re.split(r"(?<=[a-z)\"'`][.!?])\s", paragraph, maxsplit=1)[0]


@lru_cache(maxsize=2)
def _summaries(split: RowSplit) -> dict[str, str]:
    """Summaries that describe a function without naming it, by qualified name, in a mixed but fixed order."""
    usable = {}
    docstrings = _docstrings_of(split)
    for name in sorted(docstrings, key=_digest):
        text = _summary(docstrings[name])
        own_name = name.rpartition(".")[2]
        long_enough = len(text.split()) >= _SUMMARY_WORDS
        if long_enough and not re.search(rf"\b{re.escape(own_name)}\b", text, re.IGNORECASE):
            usable[name] = text
    return usable


def docstring_choices(split: RowSplit = "heldout") -> list[DocstringChoice]:
    """Questions "which function does this text describe?".

    The description is the first sentence of a docstring that does not contain the function's own name. The three
    distractors come from the same split, from other modules where there are enough, and differ from the answer and from
    each other in summary and in function name. The right answer stands at each position equally often. The order is
    mixed (by sha256), so that the first rows are a fair sample of all.

    Args:
        split: ``heldout`` is what an evaluation must use if the model was trained on ``docstring_rows("train")``.

    Returns:
        Dictionaries with ``description``, ``choices`` (four qualified names) and ``label`` (index of the right one).
    """
    summaries = _summaries(split)
    names = list(summaries)
    questions: list[DocstringChoice] = []
    for position, name in enumerate(names):
        # Neighbours in the mixed order are unrelated, and taken in turn each name is a distractor about as often as any
        # other, so that no answer can be guessed from how often it is offered.
        followers = names[position + 1 :] + names[:position]
        followers.sort(key=lambda other: _module_of(other) == _module_of(name))
        chosen = [name]
        for other in followers:
            functions = {one.rpartition(".")[2] for one in chosen}
            descriptions = {summaries[one] for one in chosen}
            if other.rpartition(".")[2] not in functions and summaries[other] not in descriptions:
                chosen.append(other)
            if len(chosen) == 4:
                break
        label = position % 4
        chosen[0], chosen[label] = chosen[label], chosen[0]
        questions.append({"description": summaries[name], "choices": chosen, "label": label})
    return questions


@cache
def _module_of(name: str) -> str:
    return max((module for module in _MODULES if name.startswith(f"{module}.")), key=len)


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Sha256 of all embedded text (topics, rows and questions of all splits), as 64 hexadecimal digits."""
    content = [
        *(topic_texts(split) for split in ("calibration", "train", "heldout")),
        *(docstring_rows(split) for split in ("train", "heldout")),
        *(docstring_choices(split) for split in ("train", "heldout")),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
