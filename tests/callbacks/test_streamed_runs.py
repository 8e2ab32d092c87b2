"""``prune`` of a model whose weights stay in their files: the same plan and the same export."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml

from callbacks import FLAP, SLEB, CompressionCallback, LLMPruner, WandaStructured
from slm_pl.cli import main
from slm_pl.compression.plan import DropLayers
from slm_pl.errors import UsageError
from slm_pl.module import CausalLM
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer

METHODS = {
    "slm": ("callbacks.SlidingWindowMerging", {"remove_layers": 2}),
    "slm_sum": ("callbacks.SlidingWindowMerging", {"remove_layers": 2, "consolidation": "sum"}),
    "best_first": (
        "callbacks.SlidingWindowMerging",
        {
            "remove_layers": 2,
            "search": "best_first",
            "similarity": "token_cosine",
            "consolidation": "least_squares",
        },
    ),
    "sleb": ("callbacks.SLEB", {"remove_layers": 2}),
    "perplexity": ("callbacks.ShortenedLLaMA", {"remove_layers": 2, "protect_first": 1, "protect_last": 1}),
    "taylor": (
        "callbacks.ShortenedLLaMA",
        {"criterion": "taylor", "remove_layers": 2, "protect_first": 1, "protect_last": 1},
    ),
    "magnitude": (
        "callbacks.ShortenedLLaMA",
        {"criterion": "magnitude", "remove_layers": 2, "protect_first": 1, "protect_last": 1},
    ),
    "block_influence": ("callbacks.BlockInfluence", {"remove_layers": 2}),
    "llm_pruner": ("callbacks.LLMPruner", {"ratio": 0.2, "attention_layers": [1, -1], "mlp_layers": [1, -1]}),
    "llm_pruner_channel": ("callbacks.LLMPruner", {"ratio": 0.2, "scope": "channel"}),
    "flap": ("callbacks.FLAP", {"ratio": 0.2}),
    "wanda": ("callbacks.WandaStructured", {"ratio": 0.2}),
}


@pytest.fixture(scope="module")
def bf16_dir(tmp_path_factory) -> Path:
    """In bfloat16, in shards that cut through layers."""
    directory = tmp_path_factory.mktemp("bf16") / "model"
    model = pico_model("qwen3", bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.bfloat16().save_pretrained(directory, max_shard_size="60KB")
    pico_tokenizer().save_pretrained(directory)
    return directory


def prune(model: Path, run: Path, methods: list[tuple[str, dict]], *words: str, command: str = "prune") -> Path:
    config = {
        "config_version": 1,
        "model": {"pretrained": str(model)},
        "data": {
            "path": "embedded",
            "max_rows": 40,
            "val_size": 4,
            "calibration": {"source": "embedded", "samples": 6, "sequence_length": 32},
        },
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": [
                *({"class_path": path, "init_args": arguments} for path, arguments in methods),
                {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": "{run}/export"}},
            ],
        },
    }
    run.mkdir(parents=True)
    (run / "mine.yaml").write_text(yaml.safe_dump(config))
    main([command, "--config", str(run / "mine.yaml"), *words])
    return run / "export"


def files_of(export: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(export.iterdir())}


QUICK = ("best_first", "taylor", "llm_pruner", "llm_pruner_channel")  # each way that weights are read or made anew


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in METHODS])
def test_plan_and_export_are_those_of_the_model_in_memory(name, bf16_dir, tmp_path):
    whole = prune(bf16_dir, tmp_path / "whole", [METHODS[name]])
    streamed = prune(bf16_dir, tmp_path / "streamed", [METHODS[name]], "--model.streaming", "true")
    assert json.loads((streamed / "plan.json").read_text())["steps"]
    assert files_of(streamed) == files_of(whole)
    assert {path.name for path in streamed.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}


class Recorder(CompressionCallback):
    """Tells whether gradients are on, where a method looks at the model."""

    computes_with_weights = True
    seen: ClassVar[list[bool]] = []

    def plan(self, model, calibration):
        self.seen.append(torch.is_grad_enabled())
        return self.make_plan(model, calibration, [DropLayers((1,))], [], {})


def test_methods_look_at_the_model_without_gradients(bf16_dir, tmp_path):
    Recorder.seen.clear()
    prune(bf16_dir, tmp_path / "run", [(f"{__name__}.Recorder", {})], "--model.streaming", "true")
    assert Recorder.seen == [False]


def test_methods_that_compute_with_weights_do_not_stream_to_a_gpu(bf16_dir):
    """The device alone is not what this machine has."""
    module = CausalLM(str(bf16_dir), streaming=True)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")), ckpt_path=None)
    trainer.default_root_dir = "."
    asked = [Recorder(), SLEB(2, consolidation="least_squares"), FLAP(0.2), LLMPruner(0.2), WandaStructured(0.2)]
    for method in asked:
        with pytest.raises(UsageError, match=r"Give --trainer\.accelerator cpu"):
            method._find_plan(trainer, module)


def test_depth_and_then_width(bf16_dir, tmp_path):
    narrow = {"ratio": 0.1, "attention_layers": [0, None], "mlp_layers": [0, None]}
    both = [METHODS["slm"], ("callbacks.LLMPruner", narrow)]
    whole = prune(bf16_dir, tmp_path / "whole", both)
    streamed = prune(bf16_dir, tmp_path / "streamed", both, "--model.streaming", "true")
    assert (streamed / "plan.2.json").is_file()
    assert files_of(streamed) == files_of(whole)


@pytest.mark.parametrize(
    ("words", "command", "said"),
    [
        (["--model.dtype", "float32"], "prune", "model.dtype is float32 and the checkpoint's bfloat16"),
        ([], "fit", "model.streaming is for prune, and this is fit"),
        (["--trainer.callbacks.dtype", "float32"], "prune", "takes the whole model in memory"),
    ],
)
def test_what_takes_the_whole_model_is_refused(words, command, said, bf16_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        prune(
            bf16_dir,
            tmp_path / "run",
            [METHODS["block_influence"]],
            "--model.streaming",
            "true",
            *words,
            command=command,
        )
    assert done.value.code == 1
    assert said in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"mine.yaml", "config_fit.yaml", "config_prune.yaml"}
