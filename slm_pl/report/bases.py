"""Which dense model each record is held against: only the one that it was made of."""

from collections.abc import Sequence

from slm_pl.results import Results


def baselines_of(records: Sequence[Results]) -> list[int | None]:
    """The place of each record's dense baseline among the records; None where there is none.

    It is the first dense record of the same base, names compared as they are recorded; that one itself has none.
    """
    found: list[int | None] = []
    for index, record in enumerate(records):
        first = next((place for place, other in enumerate(records) if _is_dense_of(other, record.model.base)), None)
        found.append(None if first == index else first)
    return found


def _is_dense_of(record: Results, base: str) -> bool:
    return _dense(record) and base in (record.model.source, record.model.base)


def warnings_of(labels: Sequence[str], records: Sequence[Results], baselines: Sequence[int | None]) -> list[str]:
    """What is not told of compressed models because of the dense models that are there, or in spite of them.

    Args:
        labels: Of the records.
        records: The records.
        baselines: As of :func:`baselines_of`.
    """
    dense = [f"{label}: {record.model.source}" for label, record in zip(labels, records, strict=True) if _dense(record)]
    by_base: dict[str, list[str]] = {}
    lacking: dict[str, list[str]] = {}
    for label, record, baseline in zip(labels, records, baselines, strict=True):
        if not _dense(record):
            by_base.setdefault(record.model.base, []).append(label)
            if baseline is None:
                lacking.setdefault(record.model.base, []).append(label)
    warnings = []
    if not dense:
        warnings.append(
            "There is no dense baseline among the records, so nothing here says what compression cost. Run `main.py "
            "test` on the dense model too and add its results.json."
        )
    elif lacking:
        each = "; ".join(f"{', '.join(of)}: made of {base}" for base, of in lacking.items())
        warnings.append(
            f"The dense model of some records is not among them ({each}; dense records are {'; '.join(dense)}), so "
            "nothing here says what compression cost these. Run `main.py test` on their dense model too, with its name "
            "written as above, and add its results.json."
        )
    if len(by_base) > 1:
        each = "; ".join(f"{', '.join(of)}: {base}" for base, of in by_base.items())
        warnings.append(
            f"The compressed models are models of different bases ({each}): the best figure of a row says which of "
            "these models is better, not which compression."
        )
    return warnings


def _dense(record: Results) -> bool:
    return record.model.plan_sha256 is None
