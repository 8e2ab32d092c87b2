import json
import shutil
import struct
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from slm_pl import files, loading
from slm_pl.data.embedded import topic_texts
from slm_pl.errors import UsageError
from tests.benchmarks.endurance import MB, settled
from tests.helpers.pico import pico_model
from tests.helpers.run import IDS, logits_of
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(pico_dir, tmp_path):
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(pico_dir, tmp_path / "copy"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_PL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_directory(pico_dir):
    source = loading.resolve(str(pico_dir), revision="abc")
    assert source == loading.Source(str(pico_dir), str(pico_dir), "abc", trust_remote_code=False)
    assert source.directory == pico_dir
    model = loading.load_model(source, "bfloat16", "eager")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.config._name_or_path == str(pico_dir)
    assert torch.equal(logits_of(loading.load_model(source)), logits_of(pico_model()))


@pytest.mark.parametrize("missing", ["./none", "/none/at/all", "~/none", "a/b/c", "none/"])
def test_missing_directory(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"There is no directory {missing}. The model is a Hub id .*package:NAME"):
        loading.resolve(missing)


def test_directory_that_is_no_checkpoint(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for path in (tmp_path, tmp_path / "file.txt"):
        with pytest.raises(UsageError, match=f"{path} holds no config.json, so it is no Hugging Face checkpoint"):
            loading.resolve(str(path))


@pytest.mark.parametrize("hub_id", ["some-org/no-such-model", "no-such-model", "not a name"])
def test_hub_id_is_not_looked_at_before_loading_and_failure_is_one_message(hub_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = loading.resolve(hub_id, revision="v1")
    assert source == loading.Source(hub_id, hub_id, "v1")
    assert source.directory is None
    for what, load in (("model", loading.load_model), ("tokenizer", loading.load_tokenizer)):
        message = rf"The {what} '{hub_id}' could not be fetched from the Hub: .*the revision \(v1\) and the network"
        with pytest.raises(UsageError, match=message) as caught:
            load(source)
        assert "\n" not in str(caught.value)


def test_package_file(tmp_path, monkeypatch, cache):
    package = tmp_path / "pico_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a package is located, never imported')")
    (package / "a.gguf").write_text("x")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UsageError, match=r"package 'pico_weights' has no file 'b.gguf'; its .gguf files are \['a.gguf'\]"
    ):
        loading.resolve("package:pico_weights/b.gguf")
    (tmp_path / "outside.gguf").write_text("x")
    for outside in ("../outside.gguf", str(tmp_path / "outside.gguf")):
        with pytest.raises(UsageError, match="package 'pico_weights' has no file"):
            loading.resolve(f"package:pico_weights/{outside}")
    with pytest.raises(UsageError, match="package 'pico_weights' has no file ''"):
        loading.resolve("package:pico_weights")
    with pytest.raises(UsageError, match=f"{package / 'a.gguf'} cannot be read as a GGUF model"):
        loading.resolve("package:pico_weights/a.gguf")
    assert "pico_weights" not in sys.modules


@pytest.mark.parametrize("package", ["not_installed_here", "not-a-name", ""])
def test_package_that_is_not_installed(package):
    with pytest.raises(UsageError, match=f"Python package '{package}', which is not installed here. Install it"):
        loading.resolve(f"package:{package}/a.gguf")


def test_code_of_a_checkpoint_is_refused_with_the_flag_named(copy, tmp_path):
    ran = tmp_path / "ran"
    (copy / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    change_config(
        copy, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    )
    with pytest.raises(UsageError, match="Python code of its own.*--model.trust_remote_code true"):
        loading.load_model(loading.resolve(str(copy)))
    assert not ran.exists()


def test_trusting_code_is_said_loudly(pico_dir):
    with pytest.warns(UserWarning, match=f"Python code that {pico_dir} brings along is run"):
        loading.resolve(str(pico_dir), trust_remote_code=True)


def test_pickled_weights_are_refused(copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (copy / WEIGHTS).unlink()
    torch.save({"trap": Trap()}, copy / "pytorch_model.bin")
    with pytest.raises(UsageError, match=f"The model in {copy} cannot be loaded: .*no file named model.safetensors"):
        loading.load_model(loading.resolve(str(copy)))
    assert not (tmp_path / "ran").exists()
    torch.save(pico_model().state_dict(), copy / "pytorch_model.bin")  # a harmless one, too
    with pytest.raises(UsageError, match="no file named model.safetensors"):
        loading.load_model(loading.resolve(str(copy)))


@pytest.mark.parametrize(
    ("written", "refused"),
    [
        ("../outside/w.safetensors", "says that weights are in '../outside/w.safetensors'"),
        ("{tmp}/outside/w.safetensors", "says that weights are in '/"),
        ("..", "says that weights are in '..'"),
        ("pytorch_model.bin", "says that weights are in 'pytorch_model.bin'"),
        (7, "says that weights are in '7'"),
        ([1], "is damaged .TypeError"),
    ],
)
def test_weights_outside_of_the_directory_are_refused(written, refused, copy, tmp_path):
    (tmp_path / "outside").mkdir()
    (copy / WEIGHTS).rename(tmp_path / "outside" / "w.safetensors")
    named = written.format(tmp=tmp_path) if isinstance(written, str) else written
    places = dict.fromkeys(load_file(tmp_path / "outside" / "w.safetensors"), named)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    source = loading.resolve(str(copy))
    for load in (loading.load_model, lambda source: loading.weight_files(source.directory)):
        with pytest.raises(UsageError, match=f"{copy}/model.safetensors.index.json {refused}"):
            load(source)


def test_adapters_beside_the_weights_are_refused(copy):
    model = peft.get_peft_model(pico_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(copy)
    for load in (loading.load_model, lambda source: loading.weight_files(source.directory)):
        with pytest.raises(UsageError, match=f"{copy} has adapters .*Merge them into the weights"):
            load(loading.resolve(str(copy)))


def test_an_index_of_shards_that_were_there_before_is_not_read(copy):
    """As saving a smaller model into the directory of a larger one leaves it."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(copy / WEIGHTS), "model-00001-of-00002.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert loading.weight_files(copy) == [copy / WEIGHTS]
    assert torch.equal(logits_of(loading.load_model(loading.resolve(str(copy)))), logits_of(pico_model()))


@pytest.mark.parametrize("name", ["x.safetensors.index.json", "adapter_model.bin", 7])
def test_a_config_names_no_weights(name, copy, tmp_path):
    """Transformers would read them, and from an index of any name those that are elsewhere."""
    (copy / WEIGHTS).rename(tmp_path / "outside.safetensors")
    places = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), "../outside.safetensors")
    (copy / "x.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    change_config(copy, transformers_weights=name)
    with pytest.raises(UsageError, match=f"config of {copy} names its own file of weights .*{name}.*remove that field"):
        loading.load_model(loading.resolve(str(copy)))


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_unreadable_weights(copy, damage):
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"xx" * 99, "empty": b""}[damage])
    with pytest.raises(UsageError, match=f"The model in {copy} cannot be loaded: SafetensorError: "):
        loading.load_model(loading.resolve(str(copy)))


def test_missing_weights_are_not_drawn_at_random(copy):
    tensors = load_file(copy / WEIGHTS)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lacks 1 of the weights .*such as model.layers.2.mlp.up_proj.weight"):
        loading.load_model(loading.resolve(str(copy)))


def test_weights_of_layers_that_the_config_does_not_ask_for(copy):
    change_config(copy, num_hidden_layers=3)
    with pytest.raises(UsageError, match=f"config of {copy} asks for 3 decoder layers, .*hold more, .*layers.3."):
        loading.load_model(loading.resolve(str(copy)))


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_weights_that_older_checkpoints_carry_are_left_over(copy, prefix):
    tensors = load_file(copy / WEIGHTS)
    tensors |= {f"{prefix}layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in (0, 5)}
    save_file({**tensors, "vision.layers.9.weight": torch.ones(4)}, copy / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(logits_of(loading.load_model(loading.resolve(str(copy)))), logits_of(pico_model()))
    save_file({**tensors, f"{prefix}layers.6.x": torch.ones(4)}, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"asks for 6 decoder layers, .* such as (model\.)?layers\.6\.x"):
        loading.load_model(loading.resolve(str(copy)))


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neox", "opt", "qwen3"])
def test_layers_left_over_are_found_by_the_paths_of_the_model(model_type, tmp_path):
    pico_model(model_type).save_pretrained(tmp_path)
    change_config(tmp_path, **{"n_layer" if model_type == "bloom" else "num_hidden_layers": 4})
    if model_type == "qwen3":
        change_config(tmp_path, layer_types=["full_attention"] * 4)
    with pytest.raises(UsageError, match="asks for 4 decoder layers, and its weights hold more"):
        loading.load_model(loading.resolve(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 0}, "asks for 0 decoder layers; allowed are 1 to 1000"),
        ({"num_hidden_layers": -1}, "asks for -1 decoder layers; allowed are 1 to 1000"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers .* is 100,000; allowed are at most 1,000"),
        ({"model_type": "qwen3", "num_hidden_layers": 10**9}, "num_hidden_layers .* is 1,000,000,000; allowed"),
        ({"model_type": "bloom", "n_layer": 10**9}, "n_layer .* is 1,000,000,000; allowed"),
        ({"num_labels": 10**8}, "num_labels .* is 100,000,000; allowed are at most 100,000"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers .* is 1,000,000,000; allowed"),
    ],
)
def test_config_that_asks_for_endless_work_or_none(copy, changes, said):
    change_config(copy, **changes)
    before = time.monotonic()
    with pytest.raises(UsageError, match=said) as caught:
        loading.read_config(loading.resolve(str(copy)))
    assert str(copy) in str(caught.value)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "zork"}, "model type `zork`"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"hidden_size": 64}, "RuntimeError"),
        ({"hidden_size": "x"}, "expected int, got str"),
    ],
)
def test_config_that_does_not_fit(copy, changes, reason):
    change_config(copy, **changes)
    with pytest.raises(UsageError, match=f"The model in {copy} cannot be loaded: .*{reason}"):
        loading.load_model(loading.resolve(str(copy)))


def test_tokenizer_by_its_name_only(copy):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "RagTokenizer"}))
    with pytest.raises(UsageError, match=f"The tokenizer in {copy} cannot be loaded: .*pad_token"):
        loading.load_tokenizer(loading.resolve(str(copy)))


@pytest.mark.parametrize("text", [None, "{ x", "{}"])
def test_unreadable_tokenizer(copy, text):
    (copy / "tokenizer.json").unlink()
    if text is not None:
        (copy / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match=f"The tokenizer in {copy} cannot be loaded: "):
        loading.load_tokenizer(loading.resolve(str(copy)))


def test_padding_falls_back_to_end_of_sequence(pico_dir, tmp_path):
    kept = loading.load_tokenizer(loading.resolve(str(pico_dir)))
    assert (kept.pad_token, kept.eos_token) == ("<pad>", "</s>")
    tokenizer = pico_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((pico_dir / "config.json").read_text())
    loaded = loading.load_tokenizer(loading.resolve(str(tmp_path)))
    assert loaded.pad_token == "</s>"
    assert loaded.pad_token_id == loaded.eos_token_id == 1


def test_tokenizers_that_are_dropped_leave_nothing(pico_dir, tmp_path):
    pico_tokenizer().save_pretrained(tmp_path)
    shutil.copy(pico_dir / "config.json", tmp_path)
    source, text = loading.resolve(str(tmp_path)), "\n\n".join(topic_texts("heldout"))
    cut = pico_tokenizer()(text).input_ids

    def load_and_cut(times):
        for _ in range(times):
            assert loading.load_tokenizer(source)(text).input_ids == cut

    load_and_cut(4)
    before = settled()
    load_and_cut(12)  # which left 10 MB with the words kept
    assert settled() - before < 3 * MB


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("SLM_PL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_directory() == tmp_path / ".cache" / "slm_pl"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert files.cache_directory() == Path("/x/slm_pl")
    monkeypatch.setenv("SLM_PL_CACHE", "/own")
    assert files.cache_directory() == Path("/own")


def write_gguf(path: Path, model: torch.nn.Module, leave_out: str = "") -> None:
    """Writes a pico Llama and the pico tokenizer as llama.cpp's converter does: q and k rows are permuted."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Pico")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(pico_tokenizer().backend_tokenizer.to_str())
    tokens = {index: token for token, index in backend["model"]["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([tokens[index] for index in range(len(tokens))])
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(tokens))])  # 3: control, 1: normal
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    tensors["output.weight"] = model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if heads:
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{index}.{theirs}.weight"] = weight
    for name, weight in tensors.items():
        if name != leave_out:
            writer.add_tensor(name, np.ascontiguousarray(weight.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_converted_once_to_an_ordinary_checkpoint(tmp_path, cache, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = pico_model(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    path = tmp_path / "Pico.F32.gguf"
    write_gguf(path, model)
    source = loading.resolve(str(path))
    assert source.pretrained == str(path)
    assert source.directory is not None
    assert source.directory.parent == cache / "gguf"
    assert source.directory.name.startswith("Pico.F32-")
    torch.testing.assert_close(logits_of(loading.load_model(source)), logits_of(model), rtol=0, atol=1e-5)
    text = "Describe the décoder layer,\n\tand its neighbour."
    tokenizer = loading.load_tokenizer(source)
    assert tokenizer(text)["input_ids"] == pico_tokenizer()(text)["input_ids"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert IDS.max() < len(tokenizer)
    assert {p.suffix for p in source.directory.iterdir()} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".sha256",
    }  # slm_pl.sha256

    def forbidden(*arguments, **options):
        pytest.fail("converted again")

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
        shutil.move(path, tmp_path / "elsewhere.gguf")
        with pytest.raises(UsageError, match="There is no file .*Pico.F32.gguf"):
            loading.resolve(str(path))
        shutil.move(tmp_path / "elsewhere.gguf", path)
        assert loading.resolve(str(path)) == source
    with path.open("r+b") as file:  # other content under the same name is another model
        file.seek(-4, 2)
        file.write(struct.pack("f", 0.5))
    assert loading.resolve(str(path)).directory != source.directory
    assert len(list((cache / "gguf").iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such magic"])
def test_unreadable_gguf_leaves_nothing_in_the_cache(tmp_path, cache, content):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{path} cannot be read as a GGUF model"):
        loading.resolve(str(path))
    assert not cache.exists()


def test_gguf_without_a_tensor_is_refused(tmp_path, cache):
    path = tmp_path / "a.gguf"
    write_gguf(path, pico_model(), leave_out="blk.3.ffn_up.weight")
    with pytest.raises(UsageError, match="lacks 1 of the weights .*such as model.layers.3.mlp.up_proj.weight"):
        loading.resolve(str(path))
    assert not cache.exists()


def test_interrupted_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    from transformers import PreTrainedModel

    def interrupt(self, directory):
        (Path(directory) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    path = tmp_path / "a.gguf"
    write_gguf(path, pico_model())
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loading.resolve(str(path))
    assert list((cache / "gguf").iterdir()) == []
    torch.testing.assert_close(
        logits_of(loading.load_model(loading.resolve(str(path)))), logits_of(pico_model()), rtol=0, atol=1e-5
    )
