"""The documents of ``embedded_docstrings.yaml``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict


def docstring_questions(**_metadata: object) -> "DatasetDict":
    """Which function does this text describe: four choices, over docstrings that no training split holds.

    The choices are contexts, and the text is what is scored after each of them (as in WinoGrande), so that neither the
    length nor the frequency of a name decides.

    Args:
        **_metadata: What lm-eval passes to every ``custom_dataset``; not used.

    Returns:
        A data set with the split ``test`` and the columns ``description``, ``contexts`` and ``label``.
    """
    from datasets import Dataset, DatasetDict

    from slm_pl.data.embedded import docstring_choices

    rows = [
        {
            "description": row["description"],
            "contexts": [f"Documentation of the Python function `{name}`:" for name in row["choices"]],
            "label": row["label"],
        }
        for row in docstring_choices("heldout")
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})
