"""Fixtures that more than one test module uses."""

import os
import shutil
import signal
import tempfile

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has its background jobs do; what is tested here is interrupted by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: each worker has a core, and its children
os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once; children inherit it
# Where the code of a checkpoint is copied to before it runs: not into the user's cache.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slm_pl.files import cache_directory
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches the Hub, also where huggingface_hub was imported before this file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="session")
def _modules_cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _cache() -> Iterator[None]:
    """What tests tokenise stays out of the user's cache; the converted model, which takes a minute, is used from it."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="slm_pl_cache_") as directory:
        own = cache_directory() / "gguf"
        own.mkdir(parents=True, exist_ok=True)
        (Path(directory) / "gguf").symlink_to(own.resolve())
        patch.setenv("SLM_PL_CACHE", directory)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Pico models are too small for two threads, which wait for each other where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pico_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a six-layer pico Llama and its tokenizer; tests only read it."""
    directory = tmp_path_factory.mktemp("pico") / "model"
    pico_model(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(directory)
    pico_tokenizer().save_pretrained(directory)
    return directory
