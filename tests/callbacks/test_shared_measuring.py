"""Two processes of a Lightning run measure together what one measures alone."""

import json
from pathlib import Path

import torch

from callbacks import Drift, Perplexity, ZeroShot
from slm_pl.data import EvaluationText
from slm_pl.evaluation import EMBEDDED_TASK
from tests.helpers.ranks import under_torchrun
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer


def _measure(run: Path, pretrained: str, **options: object) -> dict:
    texts = [EvaluationText(max_tokens=1024), EvaluationText(max_tokens=300, sequence_length=64, stride=16)]
    hooks = [Perplexity(texts, batch_size=1), Drift(texts[:1], batch_size=1), ZeroShot([EMBEDDED_TASK], limit=7)]
    trainer = make_trainer(run, Drop([1]), *hooks, **options)
    trainer.test(make_module(pretrained), alpaca_data(run.parent / f"data_{run.name}_{trainer.global_rank}"))
    if not trainer.is_global_zero:
        return {}
    return json.loads((run / "results.json").read_text())


def _together(rank: int, directory: str) -> None:
    pretrained = (Path(directory) / "pretrained").read_text()
    _measure(Path(directory) / "two", pretrained, devices=2, strategy="ddp")


def test_two_processes_measure_what_one_does(pico_dir, tmp_path):
    (tmp_path / "pretrained").write_text(str(pico_dir))
    torch.set_num_threads(1)
    alone = _measure(tmp_path / "one", str(pico_dir))
    under_torchrun(_together, tmp_path)
    both = json.loads((tmp_path / "two" / "results.json").read_text())
    assert len(both["perplexity"]) == 2
    assert both["model"]["num_layers"] == alone["model"]["num_layers"]
    assert both["drift"][0]["kl"] > 0
    for room in ("perplexity", "drift", "zero_shot"):
        assert _numbers(both[room]) == _numbers(alone[room]), room
    assert both["missing"] == alone["missing"] == {}


def _numbers(value: object) -> object:
    """Sums are added up in another order: all but the last digits are equal."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return f"{value:.9g}" if isinstance(value, float) else value
