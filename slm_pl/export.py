"""Ordinary Hugging Face checkpoints of compressed models."""

import inspect
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slm_pl import files, gguf_export
from slm_pl.compression import modeling
from slm_pl.compression.plan import Plan, count_parameters, load_plans, save_plans
from slm_pl.console import OWN_CODE
from slm_pl.errors import UsageError
from slm_pl.layer_map import TABLE, layer_map, layer_parameters, layer_table
from slm_pl.loading import DType, load_model, load_tokenizer, resolve, stock_class
from slm_pl.model_card import CARD, model_card, needs_own_code
from slm_pl.pictures import trace_pictures
from slm_pl.quantization import Quantization, compress_first, quantization_of, require_torchao
from slm_pl.sums import write_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_compressed(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    directory: str | os.PathLike[str],
    plans: list[Plan],
    recovered: bool,
    overwrite: bool = False,
    figures: Mapping[str, bytes] | None = None,
    dtype: DType = "auto",
    quantization: Quantization | None = None,
    dense_layers: Sequence[int] | None = None,
    citations: Sequence[str] = (),
) -> Path:
    """Writes a checkpoint that stock transformers loads; the directory is whole or absent.

    If the layers differ in width, the directory holds ``modeling_pruned.py``, a copy of
    :mod:`slm_pl.compression.modeling`, and the config names it: transformers runs it with ``trust_remote_code=True``.

    ``slm_pl.sha256`` holds the sums of all files but the card and its pictures; whoever loads the directory with this
    package gets what was written, or an error. ``sha256sum -c slm_pl.sha256`` says the same.

    Another dtype or int8 is what transformers makes of the ordinary checkpoint, which is written beside the directory
    for as long as that takes; the model in memory stays as it is. Whoever loads int8 needs torchao.

    Args:
        model: The compressed model, adapters merged.
        tokenizer: Its tokenizer.
        directory: Where to.
        plans: What was done to it, in order; kept beside the weights.
        recovered: Whether it was trained after compression; the model card says so.
        overwrite: Replace a directory that is not empty.
        figures: More files that say what was done, by name; the model card shows those that are ``.png``.
        dtype: Of the weights that are written; ``auto`` is the model's.
        quantization: What they are quantised to, from ``dtype``; see :func:`slm_pl.loading.load_model`.
        dense_layers: Parameters of each layer of the dense model, for the layer map; None if they are not known.
        citations: BibTeX of the methods.

    Returns:
        The directory.

    Raises:
        UsageError: If the directory is not empty and ``overwrite`` is false, or cannot be written, or if torchao is
            needed and missing, or if the model's weights are quantised already.
    """
    if (found := quantization_of(model.config)) is not None:
        raise compress_first(model.config._name_or_path, found, "exported again")
    if quantization is not None:
        require_torchao(f"quantization {quantization}")
    as_it_is = quantization is None and dtype in ("auto", str(model.dtype).removeprefix("torch."))
    with files.new_directory(directory, overwrite) as temporary:
        if as_it_is:
            written = _save(model, temporary)
        else:
            with tempfile.TemporaryDirectory(dir=temporary.parent, prefix=f"{temporary.name}.") as plain:
                _save(model, Path(plain))
                written = _save(load_model(resolve(plain), dtype, None, quantization), temporary)
        tokenizer.save_pretrained(temporary)
        save_plans(plans, temporary)
        shown, table, no_map = _layer_map(model, plans, dense_layers)
        for number, plan in enumerate(plans, start=1):
            shown |= trace_pictures(plan, number)
        shown |= figures or {}
        for name, content in (shown | table).items():
            (temporary / name).write_bytes(content)
        pictures = [name for name in shown if name.endswith((".png", ".svg"))]
        gguf = gguf_export.takes(model.config, tokenizer)
        card = model_card(model, plans, recovered, pictures, *written, citations, no_map, gguf)
        (temporary / CARD).write_text(card, encoding="utf-8")
        write_sums(temporary, left_out=[CARD, *pictures])
    return Path(directory)


def _layer_map(
    model: "PreTrainedModel", plans: list[Plan], dense_layers: Sequence[int] | None
) -> tuple[dict[str, bytes], dict[str, bytes], str | None]:
    """The map's pictures, its table, and why there is none; plans may have come with a stranger's model."""
    if not plans:
        return {}, {}, None
    try:
        after = layer_parameters(model)
        pictures = layer_map(plans, dense_layers, after, count_parameters(model))
        return pictures, {TABLE: layer_table(plans, dense_layers, after)}, None
    except UsageError as error:
        return {}, {}, str(error)


def _save(model: "PreTrainedModel", directory: Path) -> tuple[str, str | None]:
    """Writes weights and config; returns what they are: the dtype, and what they are quantised to."""
    # Transformers renames weights for some of its own classes, and reads the old names for those alone.
    model.save_pretrained(directory, save_original_format=not needs_own_code(model))
    _name_class(model, directory)
    return str(model.dtype).removeprefix("torch."), quantization_of(model.config)


def _name_class(model: "PreTrainedModel", directory: Path) -> None:
    """Says in the saved config which class the model is of, and brings its code if that is ours."""
    stock = stock_class(model.config).__name__
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    config["architectures"] = [stock]
    if needs_own_code(model):
        own = f"Pruned{stock}"
        config["architectures"] = [own]
        config["auto_map"] = {"AutoModelForCausalLM": f"{OWN_CODE}.{own}"}
        code = inspect.getsource(modeling)
        code += f"\n\nfrom transformers import {stock}  # noqa: E402\n\n{own} = with_widths({stock})\n"
        (directory / f"{OWN_CODE}.py").write_text(code, encoding="utf-8")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_compressed(
    directory: str | os.PathLike[str],
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Plan]]":
    """Reads what :func:`save_compressed` wrote.

    Returns:
        The model, its tokenizer, and the plans in the order they were applied.

    Raises:
        UsageError: If the directory is missing or holds no checkpoint.
    """
    source = resolve(os.path.join(os.fspath(directory), ""))
    return load_model(source), load_tokenizer(source), load_plans(directory)
