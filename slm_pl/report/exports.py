"""The exports that compared records are of, where they are still there: their layer maps, and their cards."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_pl.compression.plan import PLAN_FILE, Plan, load_plans
from slm_pl.errors import UsageError
from slm_pl.files import write_text
from slm_pl.layer_map import MAP, layer_map, load_sizes
from slm_pl.model_card import CARD, with_results
from slm_pl.report.comparison import Comparison
from slm_pl.report.rows import one_line
from slm_pl.report.tables import results_section
from slm_pl.results import Results


@dataclass(frozen=True)
class Export:
    """A directory with the plans that a record was measured with.

    Args:
        directory: It.
        plans: Its plans, without their tensors.
    """

    directory: Path
    plans: list[Plan]


def exports_of(comparison: Comparison) -> tuple[list[Export | None], list[str]]:
    """Looks for the plans of each record beside it and where its model was loaded from.

    Only plans of which the last has the sha256 that the record names are taken: what is there by now may be another
    model.

    Returns:
        For each record its export, or None; and what is wrong with plans that were found.
    """
    found: list[Export | None] = []
    notes: list[str] = []
    for label, path, record in zip(comparison.labels, comparison.paths, comparison.records, strict=True):
        export, wrong = _export_of(record, [Path(record.model.source), path.parent])
        found.append(export)
        notes += [one_line(f"{label}: no layer map. {one}") for one in wrong]
    return found, notes


def last_model(comparison: Comparison) -> tuple[Path, Results] | None:
    """The last compressed model that is there as it was measured: its directory and its record."""
    for record in reversed(comparison.records):
        directory = Path(record.model.source)
        if _export_of(record, [directory])[0] is not None and (directory / "config.json").is_file():
            return directory, record
    return None


def _export_of(record: Results, directories: Sequence[Path]) -> tuple[Export | None, list[str]]:
    """The first of these directories that has a record's plans; and what is wrong with plans before it."""
    wrong: list[str] = []
    wanted = record.model.plan_sha256
    for directory in directories if wanted is not None else ():
        try:
            plans = load_plans(directory, tensors=False) if (directory / PLAN_FILE).is_file() else []
        except (UsageError, OSError) as error:
            wrong.append(str(error))
            continue
        if plans and plans[-1].sha256 == wanted:
            return Export(directory, plans), wrong
    return None, wrong


def layer_maps(comparison: Comparison, exports: list[Export | None]) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Draws the maps of the models; those of one plan and size are one map.

    Returns:
        Names of the models and SVG; and why there is none of some.
    """
    drawn: dict[tuple[str, int], bytes] = {}
    names: dict[tuple[str, int], list[str]] = {}
    notes: list[str] = []
    for label, record, export in zip(comparison.labels, comparison.records, exports, strict=True):
        if export is None:
            continue
        key = export.plans[-1].sha256, record.model.num_parameters
        try:
            if key not in drawn:
                sizes = load_sizes(export.directory, export.plans)
                drawn[key] = layer_map(export.plans, *sizes, record.model.num_parameters)[f"{MAP}.svg"]
            names.setdefault(key, []).append(label)
        except UsageError as error:
            notes.append(one_line(f"{label}: no layer map. {error}"))
    return [(", ".join(names[key]), svg) for key, svg in drawn.items()], notes


def write_cards(comparison: Comparison, exports: list[Export | None]) -> tuple[list[str], list[str]]:
    """Puts the figures of each model, beside those of its dense model, into the card of its export.

    Returns:
        The cards written; and why others were not.
    """
    written: list[str] = []
    notes: list[str] = []
    for index, (label, record, export) in enumerate(zip(comparison.labels, comparison.records, exports, strict=True)):
        if record.model.plan_sha256 is None:
            continue
        # What lies beside a record is its run directory, not a model.
        if export is None or export.directory != Path(record.model.source):
            notes.append(one_line(f"{label}: no card. {record.model.source} is not there, or by now another model."))
            continue
        card = export.directory / CARD
        if card.is_symlink() or not card.is_file() or not os.access(card, os.W_OK):
            notes.append(one_line(f"{label}: no card. {card} is not there, is a link, or cannot be written."))
            continue
        try:
            text = card.read_text(encoding="utf-8")
            write_text(card, with_results(text, results_section(comparison, index)))
        except (UsageError, OSError, UnicodeDecodeError) as error:
            notes.append(one_line(f"{label}: no card. {card}: {error}"))
            continue
        written.append(str(card))
    return written, notes
