"""``main.py export --to gguf``: a compressed Llama as one file for llama.cpp."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from slm_pl import files
from slm_pl.compression.architecture import gguf_fields
from slm_pl.compression.plan import load_plans
from slm_pl.console import progress
from slm_pl.errors import UsageError
from slm_pl.gguf_tokenizer import read_vocabulary, write_vocabulary
from slm_pl.loading import (
    Source,
    check_layers,
    empty_model,
    incomplete,
    load_tokenizer,
    read_config,
    resolve,
    unreadable,
    weight_files,
)
from slm_pl.model_card import public_name
from slm_pl.quantization import quantization_of
from slm_pl.sums import check_sums

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Format = Literal["gguf"]
GGUFType = Literal["f16", "bf16", "f32"]

_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_WORTH_A_BAR = 2**30  # bytes
_OWN_CONVERTER = "llama.cpp's own convert_hf_to_gguf.py may take it."


def export_parser() -> ArgumentParser:
    """Options of ``export``."""
    parser = ArgumentParser(
        prog="main.py export",
        description="Writes an exported Llama as a GGUF file, which llama.cpp and what is built on it run. All layers "
        "have to be of one width. To quantise it, give the file to llama.cpp's llama-quantize.",
    )
    parser.add_argument("directory", type=str, help="What ExportCheckpoint wrote, or another checkpoint of a Llama.")
    parser.add_argument("--to", type=Format, required=True, help="The format.")
    parser.add_argument(
        "--out", type=str | None, default=None, help="The file. Default: beside the directory, DIRECTORY-DTYPE.gguf."
    )
    parser.add_argument("--dtype", type=GGUFType, default="f16", help="Of the matrices; vectors are always f32.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a file that is there.")
    return parser


def run_export(args: Sequence[str]) -> None:
    """Runs ``export``."""
    options = export_parser().parse_args(args)
    path = write_gguf(options.directory, options.out, options.dtype, options.overwrite)
    print(f"{path}: {path.stat().st_size:,} bytes, {options.dtype}")


def write_gguf(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    dtype: GGUFType = "f16",
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint of a Llama as GGUF, one tensor after the other; the file is whole or absent.

    Matrices are of ``dtype``, vectors (norms, biases) of float32, as llama.cpp computes with them. The rows of query
    and key change their order: llama.cpp rotates neighbours, transformers one half of a head against the other.

    Args:
        directory: Of the checkpoint.
        out: The file to write; None for one beside the directory with its name and the dtype's.
        dtype: ``f16``, ``bf16`` or ``f32``.
        overwrite: Replace the file if it is there.

    Returns:
        The file.

    Raises:
        UsageError: If the directory is no whole checkpoint of a Llama with layers of one width that llama.cpp computes
            as transformers does, or the file is there, or it cannot be written.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(f"export got {directory}, which is no directory. Give the directory of an export.")
    whole = directory.resolve()
    target = whole.with_name(f"{whole.name}-{dtype}.gguf") if out is None else Path(out)
    if target.is_dir() or target.exists() and not overwrite:
        kind = "directory" if target.is_dir() else "file"
        raise UsageError(
            f"The {kind} {target} exists. Give another file with --out"
            + ("." if kind == "directory" else ", or pass --overwrite.")
        )
    source = resolve(str(directory))
    config = read_config(source)
    _check_config(config, source.pretrained)
    check_sums(directory)
    vocabulary = read_vocabulary(load_tokenizer(source), config.vocab_size)
    if vocabulary.caution is not None:
        rank_zero_warn(vocabulary.caution)

    import gguf

    with ExitStack() as stack:
        tensors = _Tensors(source, config, stack)
        temporary = stack.enter_context(files.new_file(target))
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        stack.callback(writer.close)
        _describe(writer, config, directory, dtype)
        write_vocabulary(writer, vocabulary, directory)
        tensors.write(writer, dtype)
    return target


def takes(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether :func:`write_gguf` can write a model of this config, with this tokenizer."""
    try:
        _check_config(config, "the model")
        read_vocabulary(tokenizer, config.vocab_size)
    except UsageError:
        return False
    return True


def _check_config(config: "PreTrainedConfig", name: str) -> None:
    """Refuses, before any weight is read, what GGUF has no words for."""
    if (found := quantization_of(config)) is not None:
        raise UsageError(
            f"The weights of {name} are quantised ({found}); export takes those that are not. Export the checkpoint "
            "as it was before, and quantise the GGUF file with llama.cpp's llama-quantize."
        )
    if config.model_type != "llama":
        raise UsageError(
            f"{name} is of model_type {config.model_type!r}; export --to gguf takes llama (Llama, SmolLM2, Vicuna). "
            f"{_OWN_CONVERTER}"
        )
    if getattr(config, "layer_widths", None) is not None:
        raise UsageError(
            f"The layers of {name} differ in width; llama.cpp wants one width in all of them. Prune with uniform: true "
            "(LLMPruner), or remove layers."
        )
    if config.hidden_act != "silu":
        raise UsageError(f"{name} has the activation {config.hidden_act!r}; llama.cpp computes a Llama with silu only.")
    kind, partial = config.rope_parameters["rope_type"], config.rope_parameters.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "linear", "llama3") or partial != 1:
        raise UsageError(
            f"The rotary embedding of {name} is of type {kind!r} on {partial:.0%} of a head; export --to gguf takes "
            f"default, linear and llama3 on all of it. {_OWN_CONVERTER}"
        )
    numbers = {key: value for key, value in config.rope_parameters.items() if key not in ("rope_type", "type")}
    for key, value in numbers.items():
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise UsageError(
                f"{key} in the config of {name} is {value!r}; it is a number above 0. Get the config as it was made."
            )


def _describe(writer: "GGUFWriter", config: "PreTrainedConfig", directory: Path, dtype: GGUFType) -> None:
    """Adds everything but the tokenizer and the tensors."""
    import gguf

    plans = load_plans(directory, tensors=False)
    base = public_name(plans[0].base.pretrained) if plans else directory.resolve().name
    fields = gguf_fields(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{base}, {fields['block_count']} layers")
    kinds = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in fields.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{writer.arch}.{name}", value)  # type: ignore[arg-type]
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


class _Tensors:
    """The tensors of a checkpoint in the order of the model, read one at a time."""

    def __init__(self, source: Source, config: "PreTrainedConfig", stack: ExitStack) -> None:
        from gguf import MODEL_ARCH, MODEL_TENSOR, get_tensor_name_map
        from safetensors import safe_open

        assert source.directory is not None
        fields = gguf_fields(config)
        self._config = config
        self._fields = fields
        self._map = get_tensor_name_map(MODEL_ARCH.LLAMA, int(fields["block_count"]))
        # Rows of these change their order, head by head.
        self._heads = {
            MODEL_TENSOR.ATTN_Q: int(fields["attention.head_count"]),
            MODEL_TENSOR.ATTN_K: int(fields["attention.head_count_kv"]),
        }
        self._files: dict[str, Any] = {}
        try:
            for path in weight_files(source.directory):
                file = stack.enter_context(safe_open(path, framework="pt"))
                self._files |= dict.fromkeys(file.keys(), file)
        except UsageError:
            raise
        except Exception as error:
            raise unreadable(source, "model", error) from error
        # Of tied weights, each tensor comes once, under the name of the embedding; llama.cpp takes that for the head.
        self._shapes = {name: tuple(p.shape) for name, p in empty_model(config).named_parameters()}
        self._check(source.pretrained)

    def _check(self, pretrained: str) -> None:
        if missing := [name for name in self._shapes if name not in self._files]:
            raise incomplete(pretrained, missing)
        check_layers(self._config, self._files, pretrained)
        for name, shape in self._shapes.items():
            stored = tuple(self._files[name].get_slice(name).get_shape())
            if stored != shape:
                raise UsageError(
                    f"{name} of {pretrained} has the shape {stored}; its config asks for {shape}. Get the checkpoint "
                    "and the config that belong together."
                )

    def write(self, writer: "GGUFWriter", dtype: GGUFType) -> None:
        """Writes what was added to the writer, and the tensors behind it."""
        from gguf import GGMLQuantizationType as Kind

        kinds = {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16, torch.float32: Kind.F32}
        factors = self._frequency_factors()
        if factors is not None:
            self._announce(writer, "rope_freqs.weight", factors.shape, Kind.F32)
        for name, shape in self._shapes.items():
            self._announce(writer, self._name(name), shape, kinds[self._dtype(shape, dtype)])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        with ExitStack() as stack:
            size = sum(
                torch.Size(shape).numel() * self._dtype(shape, dtype).itemsize for shape in self._shapes.values()
            )
            step = stack.enter_context(progress("Writing GGUF", len(self._shapes))) if size >= _WORTH_A_BAR else None
            for name, shape in self._shapes.items():
                tensor = self._read(name, self._dtype(shape, dtype))
                writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
                if step is not None:
                    step(name)

    @staticmethod
    def _announce(writer: "GGUFWriter", name: str, shape: Sequence[int], kind: int) -> None:
        import numpy
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        of = GGMLQuantizationType(kind)
        count = torch.Size(shape).numel()
        writer.add_tensor_info(name, shape, numpy.dtype("float32"), count * GGML_QUANT_SIZES[of][1], raw_dtype=of)

    def _name(self, name: str) -> str:
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found

    @staticmethod
    def _dtype(shape: tuple[int, ...], dtype: GGUFType) -> torch.dtype:
        return _DTYPES[dtype] if len(shape) > 1 else torch.float32

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as the file is to hold it."""
        stored = cast(Tensor, self._files[name].get_tensor(name))
        tensor = stored.to(dtype)
        if dtype == torch.float16 and not torch.isfinite(tensor).all() and torch.isfinite(stored).all():
            raise UsageError(
                f"{name} has values up to {stored.abs().max().item():.4g}; f16 ends at 65504. Give --dtype bf16 or f32."
            )
        kind = self._map.get_type(name, try_suffixes=(".weight", ".bias"))
        if kind in self._heads:
            # Of each head, the first and the second half by turns.
            tensor = tensor.reshape(self._heads[kind], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def _frequency_factors(self) -> Tensor | None:
        """By what Llama 3.1 divides each rotary frequency, float32, half as many as a head has entries."""
        if self._config.rope_parameters["rope_type"] != "llama3":
            return None
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self._config, torch.device("cpu"))
        size = int(self._fields["rope.dimension_count"])
        plain = self._config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
        return cast(Tensor, plain / scaled)
