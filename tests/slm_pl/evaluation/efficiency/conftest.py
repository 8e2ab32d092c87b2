import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def _quick_collection() -> Iterator[None]:
    """Every measurement collects garbage; without what all imports left, that takes no third of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
