"""Two processes of a Lightning run measure together what one measures alone."""

import json
from functools import partial
from pathlib import Path

import torch

from callbacks import Drift, Efficiency, ExportCheckpoint, Perplexity, ZeroShot
from slm_pl.data import EvaluationText
from slm_pl.evaluation import EMBEDDED_TASK
from tests.helpers.ranks import under_torchrun
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer


def _measure(run: Path, pretrained: str, *methods: Drop, **options: object) -> list:
    texts = [EvaluationText(max_tokens=1024), EvaluationText(max_tokens=300, sequence_length=64, stride=16)]
    hooks = [Perplexity(texts, batch_size=1), Drift(texts, batch_size=1), ZeroShot([EMBEDDED_TASK], limit=7)]
    trainer = make_trainer(run, *methods, *hooks, **options)
    module = make_module(pretrained)
    trainer.test(module, alpaca_data(run.parent / f"data_{run.name}_{trainer.global_rank}"), verbose=False)
    assert module.results is not None
    return [module.results.perplexity, module.results.drift, module.results.zero_shot]


def _together(rank: int, directory: str, pretrained: str, export: str) -> None:
    root = Path(directory)
    in_run = _measure(root / "in_run_2", pretrained, Drop([1]), devices=2, strategy="ddp")
    loaded = _measure(root / "loaded_2", export, devices=2, strategy="ddp")
    (root / f"rank{rank}").write_text(repr((in_run, loaded)))
    # Of several ranks, the first one has the machine for itself.
    speed = Efficiency(batch_size=[1, 2], new_tokens=2, warmup=0, repeats=2, baseline=pretrained)
    trainer, module = make_trainer(root / "speed_2", speed, devices=2, strategy="ddp"), make_module(export)
    trainer.test(module, alpaca_data(root / f"data_speed_{rank}"), verbose=False)
    assert module.results is not None
    (root / f"points{rank}").write_text(str(len(module.results.efficiency)))


def test_two_processes_measure_what_one_does(pico_dir, tmp_path):
    export = tmp_path / "export"
    chain = [Drop([1]), ExportCheckpoint(str(export))]
    make_trainer(tmp_path / "prune", *chain).prune(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    torch.set_num_threads(1)
    _measure(tmp_path / "in_run_1", str(pico_dir), Drop([1]))
    _measure(tmp_path / "loaded_1", str(export))
    under_torchrun(partial(_together, pretrained=str(pico_dir), export=str(export)), tmp_path)
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    for name in ("in_run", "loaded"):
        alone, both = (json.loads((tmp_path / f"{name}_{n}" / "results.json").read_text()) for n in (1, 2))
        assert (len(both["perplexity"]), len(both["drift"])) == (2, 2)
        assert both["drift"][0]["kl"] > 0
        for room in ("perplexity", "drift", "zero_shot"):
            assert _numbers(both[room]) == _numbers(alone[room]), (name, room)
        assert both["missing"] == alone["missing"] == {}
    assert (tmp_path / "points0").read_text() == "2"
    assert (tmp_path / "points1").read_text() == "0"
    speed = json.loads((tmp_path / "speed_2" / "results.json").read_text())["efficiency"]
    assert [one["paired"]["latency"]["pairs"] for one in speed] == [2, 2]


def _numbers(value: object) -> object:
    """Sums are added up in another order: all but the last digits are equal."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return f"{value:.9g}" if isinstance(value, float) else value
