import json

import lightning.pytorch as pl
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from callbacks import Efficiency, ExportCheckpoint
from slm_pl.cli import main
from slm_pl.errors import UsageError
from slm_pl.evaluation.efficiency import measuring
from slm_pl.evaluation.efficiency.nvml import GpuFigures
from slm_pl.evaluation.efficiency.record import Energy, Utilisation
from slm_pl.results import Results
from tests.helpers.pico import pico_model
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

GPU = {"gpu_utilisation", "gpu_energy", "gpu_memory"}
QUICK = {"warmup": 1, "repeats": 6}


def record_of(run, pretrained, *callbacks, baseline=None, **options):
    trainer = make_trainer(run, *callbacks)
    trainer.baseline = baseline
    trainer.test(make_module(pretrained, **options), alpaca_data(run / "data"), verbose=False)
    return Results.load(run / "results.json")


def save_unknown(directory):
    """A model whose layers this package does not know."""
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=256, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        directory
    )
    pico_tokenizer().save_pretrained(directory)


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


def test_no_room_for_the_baseline_loses_nothing(pico_dir, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 26 GiB.")

    monkeypatch.setattr(Efficiency, "_load", full)
    with pytest.warns(UserWarning, match="could not be loaded beside the model: out of memory"):
        found = record_of(tmp_path, pico_dir, Efficiency(new_tokens=2, baseline=str(pico_dir), **QUICK))
    assert found.efficiency[0].latency_s.n == 6
    assert found.efficiency[0].paired is None
    assert found.missing["efficiency[0].paired"].startswith("with both models, out of memory: CUDA out of memory")


def test_what_nvml_told_of_some_points_only_is_missing_at_the_others(pico_dir, tmp_path, monkeypatch):
    """With a stand-in for NVML, which this machine does not have."""

    def figures(self, tokens):
        absent = "too few samples" if tokens < 10 else None
        reasons = {"gpu_energy": absent, "gpu_memory": "not told"}
        energy = None if absent else Energy(5.0, 5.0 / tokens, "counter")
        return GpuFigures(Utilisation(2.0, 40), energy, missing={k: v for k, v in reasons.items() if v})

    monkeypatch.setattr(measuring.GpuSampler, "figures", figures)
    found = record_of(tmp_path, pico_dir, Efficiency(batch_size=[1, 4], new_tokens=2, warmup=0, repeats=2))
    assert found.missing == {"gpu_memory": "not told", "efficiency[0].energy": "too few samples"}
    assert [one.energy and one.energy.joules for one in found.efficiency] == [None, 5.0]


def test_the_command_line_overrides_the_baseline_of_a_config(pico_dir, tmp_path):
    hook = Efficiency(new_tokens=2, baseline="./nowhere", **QUICK)
    found = record_of(tmp_path, pico_dir, hook, baseline=str(pico_dir))
    assert found.efficiency[0].paired.baseline == str(pico_dir)


def test_adapters_are_merged_before(pico_dir, tmp_path):
    class Modules(pl.Callback):
        def on_test_epoch_end(self, trainer, pl_module):
            self.names = [name for name, _ in pl_module.measured()[0].named_modules()]

    fit = make_trainer(tmp_path / "fit", pl.callbacks.ModelCheckpoint(tmp_path / "fit"))
    fit.fit(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    (checkpoint,) = (tmp_path / "fit").glob("*.ckpt")
    seen, hook = Modules(), Efficiency(new_tokens=2, warmup=0, repeats=2)
    trainer = make_trainer(tmp_path / "test", hook, seen)
    trainer.test(make_module(pico_dir), alpaca_data(tmp_path / "data"), ckpt_path=str(checkpoint), verbose=False)
    assert not any("lora" in name for name in seen.names)
    record = Results.load(tmp_path / "test" / "results.json")
    plain = record_of(tmp_path / "plain", pico_dir, Efficiency(new_tokens=2, warmup=0, repeats=2))
    assert record.efficiency[0].work == plain.efficiency[0].work


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("switches", [{}, {"cache": "static"}, {"cache": "static", "compile": True}])
def test_on_a_gpu(switches, pico_dir, tmp_path):
    trainer = make_trainer(
        tmp_path, Efficiency(new_tokens=4, baseline=str(pico_dir), **QUICK, **switches), accelerator="gpu"
    )
    trainer.test(make_module(pico_dir), alpaca_data(tmp_path / "data"), verbose=False)
    found = Results.load(tmp_path / "results.json").efficiency[0]
    assert found.runtime.compile == bool(switches.get("compile"))
    assert found.peak_memory_bytes.reserved >= found.peak_memory_bytes.max > found.memory.weights
    assert found.memory.kv_cache == found.memory.kv_cache_computed
    assert 0 < found.time_to_first_token_s.max < found.latency_s.max
    assert 0 < found.limit.latency_share < 1
    assert found.paired.latency.pairs == 6


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
        ({"compile": True, "cache": "static", "warmup": 1}, "the first two runs compile. Give 2 or more"),
        ({"prompt": ["a", "b", "c"], "batch_size": 2}, "3 prompts and batches of 2 at most"),
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
    with pytest.raises(UsageError, match="sdpa_backend cudnn, which is for GPUs; on a CPU there are flash and math"):
        record_of(tmp_path / "kernels", pico_dir, drop, Efficiency(sdpa_backend="cudnn"))
    save_unknown(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="it is of model_type 'gpt2', whose layers are not known here"):
        record_of(tmp_path / "unknown", tmp_path / "gpt2", Efficiency(baseline=str(pico_dir)))
    assert drop.searches == 0


def test_an_unknown_architecture_is_measured_alone(tmp_path):
    save_unknown(tmp_path / "gpt2")
    one = record_of(tmp_path / "run", tmp_path / "gpt2", Efficiency(prompt_tokens=7, new_tokens=4, **QUICK)).efficiency[
        0
    ]
    assert one.memory.kv_cache == 2 * 2 * 32 * 4 * (7 + 4 - 1)
    assert one.memory.kv_cache_computed is None
    assert one.work.kv_bytes_per_token == 2 * 2 * 32 * 4
