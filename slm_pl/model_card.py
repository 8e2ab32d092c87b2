"""The model card of an export: what it was made of, how, what it is worth, how to load it, and whom to cite."""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import (
    DropLayers,
    KeepChannels,
    KeepHidden,
    MergeLayers,
    Plan,
    RefitOutput,
    count_parameters,
)
from slm_pl.console import OWN_CODE, load_example
from slm_pl.layer_map import MAP
from slm_pl.pictures import IMPORTANCE, TRACE, WIDTHS
from slm_pl.quantization import INT8

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = "README.md"
RESULTS_BEGIN, RESULTS_END = "<!-- slm_pl results -->", "<!-- slm_pl results end -->"
_UNMEASURED = "Not measured yet: `python main.py test`, then `python main.py compare … --cards` puts the figures here."


def needs_own_code(model: "PreTrainedModel") -> bool:
    """Whether stock transformers cannot build the model: its layers differ in width."""
    return getattr(model.config, "layer_widths", None) is not None


def public_name(pretrained: str) -> str:
    """What may be told of where a model or a text is, since an export is made to be shared.

    A Hub id and what a package holds is told whole; of a path, on this machine or another, the last part.
    """
    told = is_hub_id(pretrained) and not os.path.exists(pretrained)
    if not told and not re.fullmatch(r"package:\w+/[\w.-]+", pretrained):
        pretrained = re.split(r"[/\\]", pretrained.rstrip("/\\"))[-1] or "unnamed"
    return pretrained.encode(errors="replace").decode()


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a model's id on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


_ALT_TEXTS = {
    MAP: "What became of every layer",
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


def _code(text: str) -> str:
    """A text from a plan, which a stranger may have written, as code in a line or a cell of a table."""
    return "`" + re.sub(r"\s+", " ", text).replace("`", "'").replace("|", "\\|") + "`"


def hub_id(plans: Sequence[Plan], model: "PreTrainedModel") -> str | None:
    """The dense model's id on the Hub; None if it is not known to come from there."""
    if plans:
        name, revision = plans[0].base.pretrained, plans[0].base.revision
    else:
        name, revision = str(model.config._name_or_path), getattr(model.config, "_commit_hash", None)
    # Only what was resolved there has a revision; a path may look like an id.
    return name if is_hub_id(name) and revision is not None and not os.path.exists(name) else None


def model_card(
    model: "PreTrainedModel",
    plans: list[Plan],
    recovered: bool,
    pictures: list[str],
    dtype: str,
    quantised: str | None,
    citations: Sequence[str] = (),
    no_map: str | None = None,
    gguf: bool = False,
) -> str:
    """The card as Markdown; texts of plans are escaped.

    Args:
        model: The compressed model.
        plans: What was done to it, in order.
        recovered: Whether it was trained after compression.
        pictures: Names of the pictures beside the card.
        dtype: Of the weights.
        quantised: What they are quantised to; None if they are not.
        citations: BibTeX of the methods.
        no_map: Why there is no layer map.
        gguf: Whether ``export --to gguf`` takes it.
    """
    base = hub_id(plans, model)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f'base_model: "{base}"'] if base is not None else []
    tags, kind = ("pruned, slm_pl", "compressed causal") if plans else ("slm_pl", "causal")
    lines += [f"tags: [{tags}]", "---", "", f"# A {kind} language model", ""]
    lines += _made_of(model, plans, recovered)
    lines += ["", f"Its weights are in {dtype}."]
    if quantised is not None:
        lines[-1] = (
            f"Its weights are quantised: {quantised}. What is not (embeddings, norms, biases, the language-model head, "
            f"experts) is in {dtype}, which it computes in. "
            + ("Loading it takes `pip install torchao`." if quantised == INT8 else "")
        )
    lines += ["", f"There is no layer map: {_code(no_map)}"] if no_map else []
    for picture in pictures:
        name, _, kind = picture.partition(".")
        if kind.endswith("png"):
            lines += ["", f"![{_ALT_TEXTS.get(name, 'How alike the layers were before')}]({picture})"]
    lines += ["", "## Results", "", RESULTS_BEGIN, _UNMEASURED, RESULTS_END]
    lines += ["", "## Use", "", *_use(model, plans, quantised, gguf)]
    if citations:
        lines += ["## Citation", "", "```bibtex", "\n\n".join(citations), "```", ""]
    licence = "The licence of the base model applies to this checkpoint"
    licence += "; so does that of the data it was trained on after compression." if recovered else "."
    lines += ["## Licence", "", licence, ""]
    return "\n".join(lines)


def with_results(card: str, results: str) -> str:
    """A card with these results in the place of those that it has; at its end, if it has no place for them."""
    section = f"{RESULTS_BEGIN}\n{results.strip()}\n{RESULTS_END}"
    before, begin, rest = card.partition(RESULTS_BEGIN)
    _, end, after = rest.partition(RESULTS_END)
    if begin and end:
        return before + section + after
    return f"{card.rstrip()}\n\n## Results\n\n{section}\n"


def _made_of(model: "PreTrainedModel", plans: list[Plan], recovered: bool) -> list[str]:
    parameters = count_parameters(model)
    if not plans:
        return [f"{_code(public_name(model.config._name_or_path))}, {parameters:,} parameters; no plan was applied."]
    base = plans[0].base
    share = 1 - parameters / base.num_parameters
    revision = "" if base.revision is None else f" at revision {_code(base.revision)}"
    lines = [
        f"Made from {_code(public_name(base.pretrained))}{revision}: "
        f"{base.num_layers} → {num_layers(model)} decoder layers, "
        f"{base.num_parameters:,} → {parameters:,} parameters ({share:.1%} fewer{_asked(plans)}). "
        + ("Recovered by training after compression." if recovered else "Not trained after compression."),
        "",
        "| step | method | what |",
        "|---|---|---|",
    ]
    for number, plan in enumerate(plans, start=1):
        arguments = ", ".join(f"{k}={v}" for k, v in plan.method.init_args.items() if v is not None)
        method = _code(f"{plan.method.class_path}({arguments})")
        lines.append(f"| {number} | {method} | {'<br>'.join(_describe(plan))} |")
    lines += ["", "The plans beside this file (`plan.json`, …) hold every try of the search. Their sha256:"]
    return lines + [f"`{plan.sha256}`" for plan in plans]


def _use(model: "PreTrainedModel", plans: list[Plan], quantised: str | None, gguf: bool) -> list[str]:
    """How to load it, and which other programs can."""
    own_code = needs_own_code(model)
    lines = ["```python", load_example(".", "own code" if own_code else "stock", quantised == INT8), "```", ""]
    if own_code:
        lines += [
            f"Its layers differ in width, which `{OWN_CODE}.py` beside this file tells transformers. With slm_pl, "
            '`slm_pl.export.load_compressed(".")` loads it without running that file. vLLM and llama.cpp want layers '
            "of one width and do not take it.",
            "",
        ]
    if own_code or quantised is not None:
        return lines
    # Of layers that are narrower, all alike, only what this package writes is known to be right.
    narrowed = any(isinstance(step, KeepChannels | KeepHidden) for plan in plans for step in plan.steps)
    if not narrowed:
        fewer = " with fewer layers" if plans else ""
        lines += [
            f"To other programs, it is a model of its stock class{fewer}. vLLM serves it from its directory:",
            "",
            "```sh",
            "vllm serve .",
            "```",
            "",
        ]
    converters = {
        "slm_pl": "python main.py export --to gguf DIRECTORY" if gguf else None,
        "llama.cpp's own converter": None if narrowed else "python convert_hf_to_gguf.py DIRECTORY --outtype f16",
    }
    commands = [command for command in converters.values() if command is not None]
    if commands:
        who = " or ".join(name for name, command in converters.items() if command is not None)
        may = "" if gguf else ", which may take it"
        lines += [
            f"For llama.cpp, write it as GGUF with {who}{may}; then run that file:",
            "",
            "```sh",
            *commands,
            "llama-cli -m FILE.gguf -p 'Once upon a time'",
            "```",
            "",
        ]
    return lines
