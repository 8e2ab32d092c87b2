"""Ordinary Hugging Face checkpoints of compressed models."""

import inspect
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slm_pl import files
from slm_pl.compression import modeling
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import (
    DropLayers,
    KeepChannels,
    KeepHidden,
    MergeLayers,
    Plan,
    RefitOutput,
    count_parameters,
    load_plans,
    save_plans,
)
from slm_pl.console import OWN_CODE, load_example
from slm_pl.loading import DType, load_model, load_tokenizer, resolve, stock_class
from slm_pl.pictures import IMPORTANCE, TRACE, WIDTHS, trace_pictures
from slm_pl.quantization import INT8, Quantization, compress_first, quantization_of, require_torchao
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
        shown: dict[str, bytes] = {}
        for number, plan in enumerate(plans, start=1):
            shown |= trace_pictures(plan, number)
        shown |= figures or {}
        for name, content in shown.items():
            (temporary / name).write_bytes(content)
        pictures = [name for name in shown if name.endswith(".png")]
        card = _model_card(model, plans, recovered, pictures, *written)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_sums(temporary, left_out=["README.md", *pictures])
    return Path(directory)


def _save(model: "PreTrainedModel", directory: Path) -> tuple[str, str | None]:
    """Writes weights and config; returns what they are: the dtype, and what they are quantised to."""
    # Transformers renames weights for some of its own classes, and reads the old names for those alone.
    model.save_pretrained(directory, save_original_format=not needs_own_code(model))
    _name_class(model, directory)
    return str(model.dtype).removeprefix("torch."), quantization_of(model.config)


def needs_own_code(model: "PreTrainedModel") -> bool:
    """Whether stock transformers cannot build the model: its layers differ in width."""
    return getattr(model.config, "layer_widths", None) is not None


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


def public_name(pretrained: str) -> str:
    """What may be told of a path: its last part, since an export is made to be shared."""
    return Path(pretrained).name if Path(pretrained).exists() else pretrained


_ALT_TEXTS = {
    TRACE: "Every try of the search",
    IMPORTANCE: "The score of every layer",
    WIDTHS: "How wide every layer is",
    "learning_curves": "Losses and learning rate of the training",
}


def _describe(plan: Plan) -> list[str]:
    """What a plan did, a line for each step; one for all layers that were made narrower."""
    lines: list[str] = []
    for step in plan.steps:
        if isinstance(step, MergeLayers):
            norms = f"norms: {step.other_parameters}"
            lines.append(f"merge layers {step.low}–{step.high} into one ({step.consolidation}, {norms})")
        elif isinstance(step, DropLayers):
            lines.append(f"remove layers {', '.join(map(str, step.layers))}")
        elif isinstance(step, RefitOutput):
            lines.append(f"refit by least squares what the {step.group} of layer {step.layer} writes")
        elif isinstance(step, KeepHidden):
            lines.append(f"keep {len(step.indices):,} channels of the hidden state")
    for group, unit in (("attention", "KV groups"), ("mlp", "MLP channels")):
        narrow = [step for step in plan.steps if isinstance(step, KeepChannels) and step.group == group]
        if narrow:
            widths = sorted(len(step.indices) for step in narrow)
            span = f"{widths[0]:,}" if widths[0] == widths[-1] else f"{widths[0]:,} to {widths[-1]:,}"
            biased = ", with a bias in their place" if any(step.bias for step in narrow) else ""
            layers = [step.layer for step in narrow]
            where = f"{len(layers)} layers from {min(layers)} to {max(layers)}"
            where = where if len(layers) > 1 else f"layer {layers[0]}"
            lines.append(f"keep {span} {unit if widths[-1] != 1 else unit.removesuffix('s')} in {where}{biased}")
    return lines


def _asked(plans: list[Plan]) -> str:
    shares = [f"{plan.requested_ratio:.1%}" for plan in plans if plan.requested_ratio is not None]
    return f"; {' and then '.join(shares)} asked for" if len(shares) == len(plans) else ""


def _model_card(
    model: "PreTrainedModel",
    plans: list[Plan],
    recovered: bool,
    pictures: list[str],
    dtype: str,
    quantised: str | None,
) -> str:
    parameters = count_parameters(model)
    lines = ["---", "library_name: transformers", "tags: [pruned, slm_pl]"]
    lines += ["---", "", "# A compressed causal language model", ""]
    if plans:
        base = plans[0].base
        share = 1 - parameters / base.num_parameters
        lines += [
            f"Made from `{public_name(base.pretrained)}`{f' at revision `{base.revision}`' if base.revision else ''}: "
            f"{base.num_layers} → {num_layers(model)} decoder layers, "
            f"{base.num_parameters:,} → {parameters:,} parameters ({share:.1%} fewer{_asked(plans)}). "
            + ("Recovered by training after compression." if recovered else "Not trained after compression."),
            "",
            "| step | method | what |",
            "|---|---|---|",
        ]
        for number, plan in enumerate(plans, start=1):
            arguments = ", ".join(f"{k}={v}" for k, v in plan.method.init_args.items() if v is not None)
            for what in _describe(plan):
                lines.append(f"| {number} | `{plan.method.class_path}({arguments})` | {what} |")
        lines += ["", "The plans beside this file (`plan.json`, …) hold every try of the search. Their sha256:"]
        lines += [f"`{plan.sha256}`" for plan in plans]
    else:
        lines += [f"`{public_name(model.config._name_or_path)}`, {parameters:,} parameters; no plan was applied."]
    lines += ["", f"Its weights are in {dtype}."]
    if quantised is not None:
        lines[-1] = (
            f"Its weights are quantised: {quantised}. What is not (embeddings, norms, biases, the language-model head, "
            f"experts) is in {dtype}, which it computes in. "
            + ("Loading it takes `pip install torchao`." if quantised == INT8 else "")
        )
    for picture in pictures:
        what = _ALT_TEXTS.get(picture.partition(".")[0], "How alike the layers were before")
        lines += ["", f"![{what}]({picture})"]
    lines += ["", "```python", load_example(".", needs_own_code(model), quantised == INT8), "```", ""]
    if needs_own_code(model):
        lines += [
            f"Its layers differ in width, which `{OWN_CODE}.py` beside this file tells transformers. With slm_pl, "
            '`slm_pl.export.load_compressed(".")` loads it without running that file.',
            "",
        ]
    lines += [
        "The licence of the base model applies to this checkpoint; so does that of the data it was trained on.",
        "",
    ]
    return "\n".join(lines)
