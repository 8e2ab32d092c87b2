import json

import pytest
import torch

from callbacks import Efficiency, ExportCheckpoint
from slm_pl.cli import main
from slm_pl.errors import UsageError
from slm_pl.evaluation.efficiency import measuring
from slm_pl.results import Results
from tests.helpers.pico import pico_model
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

GPU = {"gpu_utilisation", "gpu_energy", "gpu_memory"}
QUICK = {"warmup": 1, "repeats": 6}


def record_of(run, pretrained, *callbacks, baseline=None, **options):
    trainer = make_trainer(run, *callbacks)
    trainer.baseline = baseline
    trainer.test(make_module(pretrained, **options), alpaca_data(run / "data"), verbose=False)
    return Results.load(run / "results.json")


def test_a_grid_in_one_hook(pico_dir, tmp_path):
    hook = Efficiency(batch_size=[1, 3], prompt_tokens=[7], new_tokens=[0, 4], warmup=0, repeats=2)
    found = record_of(tmp_path, pico_dir, hook)
    points = [(one.batch_size, one.prompt_tokens, one.new_tokens) for one in found.efficiency]
    assert points == [(1, 7, 0), (3, 7, 0), (1, 7, 4), (3, 7, 4)]
    for one in found.efficiency:
        assert (one.protocol, one.warmup, one.repeats) == ("shortened_llama", 0, 2)
        assert one.latency_s.min > 0
        assert (one.output_tokens_per_s is None) == (one.new_tokens == 0)
        assert one.runtime.dtype == "float32"
        assert one.memory.kv_cache == one.memory.kv_cache_computed
        # Nothing runs faster than its work allows; a pico model is far from it.
        assert 0 < one.limit.latency_share < 1
    # What the machine can do is measured once, not at every point.
    assert len({one.machine_peak for one in found.efficiency}) == 1
    assert set(found.missing) == GPU
    assert "NVIDIA" in found.missing["gpu_energy"]
    assert (tmp_path / "efficiency.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_published_protocols_are_named(pico_dir, tmp_path):
    sleb = Efficiency("sleb", batch_size=2, prompt_tokens=16, new_tokens=[0, 4], warmup=0, repeats=2)
    pruner = Efficiency("llm_pruner", warmup=0, repeats=2)
    found = record_of(tmp_path, pico_dir, sleb, pruner).efficiency
    points = [(one.protocol, one.batch_size, one.prompt_tokens, one.new_tokens) for one in found]
    assert points == [("sleb", 2, 16, 0), ("sleb", 2, 16, 4), ("llm_pruner", 1, 64, 0)]
    assert [one.runtime.sampling for one in found] == [None, "greedy", None]


def test_a_baseline_runs_in_turn(pico_dir, tmp_path):
    export = tmp_path / "export"
    chain = [Drop([1, 2]), ExportCheckpoint(str(export))]
    make_trainer(tmp_path / "prune", *chain).prune(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    hook = Efficiency(batch_size=[1, 2], new_tokens=4, **QUICK)
    found = record_of(tmp_path / "test", export, hook, baseline=str(pico_dir))
    whole, fewer = (pico_model("llama").config.num_hidden_layers - gone for gone in (0, 2))
    assert len(found.efficiency) == 2
    for one in found.efficiency:
        paired = one.paired
        assert (paired.baseline, paired.num_layers) == (str(pico_dir), whole)
        assert paired.promise.layers == whole / fewer
        # A third of the layers less reads fewer bytes, and does fewer operations, but the head stays.
        assert 1 < paired.promise.decode_bytes < whole / fewer
        assert 1 < paired.promise.prefill_macs < whole / fewer
        assert 1 < paired.promise.decode_layer_times <= whole / fewer
        assert paired.latency.low <= paired.latency.value <= paired.latency.high
        assert (paired.latency.pairs, paired.latency.confidence) == (6, 1 - 2 / 2**6)
    # The same in YAML.
    other = record_of(tmp_path / "own", export, Efficiency(new_tokens=2, baseline=str(pico_dir), **QUICK))
    assert other.efficiency[0].paired.baseline == str(pico_dir)


def test_a_compressed_model_in_the_same_run(pico_dir, tmp_path):
    hook = Efficiency(new_tokens=2, baseline=str(pico_dir), **QUICK)
    found = record_of(tmp_path, pico_dir, Drop([1]), hook)
    assert found.efficiency[0].paired.num_layers == found.model.num_layers + 1


def test_the_command_line_takes_a_baseline(pico_dir, tmp_path, capsys):
    config = {
        "model": {"pretrained": str(pico_dir)},
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path / "run"),
            "callbacks": [{"class_path": "callbacks.Efficiency", "init_args": {"new_tokens": 2, "repeats": 2}}],
        },
    }
    path = tmp_path / "test.yaml"
    path.write_text(json.dumps(config))
    main(["test", "--config", str(path), "--baseline", str(pico_dir)])
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["efficiency"][0]["paired"]["baseline"] == str(pico_dir)
    with pytest.raises(SystemExit) as ended:
        main(["test", "--config", str(path), "--baseline", str(pico_dir), "--trainer.callbacks", "[]"])
    assert ended.value.code == 1
    assert "no hook compares speed. Add callbacks.Efficiency" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(path), "--baseline", str(pico_dir)])
    assert ended.value.code == 2
    assert "--baseline" in capsys.readouterr().err


def test_a_point_without_room_does_not_end_the_grid(pico_dir, tmp_path, monkeypatch):
    timed = measuring.Runner.timed

    def hungry(self, seed):
        if len(self.batch.ids) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return timed(self, seed)

    monkeypatch.setattr(measuring.Runner, "timed", hungry)
    hook = Efficiency(batch_size=[1, 2, 3], new_tokens=2, baseline=str(pico_dir), **QUICK)
    with pytest.warns(UserWarning, match="batch 2.*out of memory"):
        found = record_of(tmp_path, pico_dir, hook)
    assert [one.latency_s is None for one in found.efficiency] == [False, True, False]
    assert found.missing["efficiency[1].latency_s"] == "out of memory: CUDA out of memory. Tried to allocate 2 GiB."
    assert [one.paired is None for one in found.efficiency] == [False, True, False]


def test_what_ran_is_named(pico_dir, tmp_path):
    hook = Efficiency(new_tokens=3, cache="static", sdpa_backend="math", warmup=0, repeats=2)
    found = record_of(tmp_path, pico_dir, hook, dtype="bfloat16", attn_implementation="sdpa").efficiency[0]
    ran = found.runtime
    assert (ran.dtype, ran.attention, ran.sdpa_backend, ran.cache, ran.compile, ran.quantization, ran.sampling) == (
        ("bfloat16", "sdpa", "math", "static", False, None, "sampled")
    )
    assert found.machine_peak.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "Add cache: static"),
        ({"prompt": "a", "prompt_tokens": 3}, "Give a prompt, which has its length, or"),
        ({"warmup": -1}, "warmup -1; allowed is 0 or more"),
        ({"batch_size": []}, "empty list for batch_size"),
        ({"batch_size": [2, 0]}, "batch_size 0; allowed is 1 or more"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(UsageError, match=message):
        Efficiency(**options)


def test_what_does_not_fit_the_model_is_told_before_a_search(pico_dir, tmp_path):
    drop = Drop([1])
    message = "a prompt of 200 tokens and new_tokens 128; the context .* holds 256. Take new_tokens 56 or"
    with pytest.raises(UsageError, match=message):
        record_of(tmp_path / "long", pico_dir, drop, Efficiency(prompt_tokens=200))
    other = pico_model("llama", vocab_size=640)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="The vocabulary of the baseline .* has 640 tokens"):
        record_of(tmp_path / "words", pico_dir, drop, Efficiency(baseline=str(tmp_path / "other")))
    with pytest.raises(UsageError, match="There is no directory"):
        record_of(tmp_path / "gone", pico_dir, drop, Efficiency(baseline="./nowhere"))
    assert drop.searches == 0
