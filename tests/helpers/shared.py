"""The reference data beside the repository: recorded results of the authors' programs. Absent in most clones."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "reference" / "golden").is_dir(), reason=f"reference data not found in {SHARED}"
)
