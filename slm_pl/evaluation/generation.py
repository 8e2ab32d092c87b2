"""What several models write to the same prompts, side by side."""

import html
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from slm_pl.evaluation._model import device_of, evaluation_mode

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pl.data.prompts import Prompt

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class GenerationProtocol:
    """How all completions were made.

    Args:
        max_new_tokens: Longest completion; an end-of-sequence token ends it earlier.
        dtype: Of the weights, such as ``float32``.
        precision: Lightning's; with ``bf16-mixed`` and the like, matrices are multiplied in fewer bits than ``dtype``.
        decoding: Always the most likely token.
    """

    max_new_tokens: int
    dtype: str
    precision: str
    decoding: str = "greedy"


@dataclass(frozen=True)
class ModelCompletions:
    """What one model wrote.

    Args:
        label: The column's name.
        source: What the model was loaded from: a hub id, a directory or a file.
        num_parameters: All parameters, shared ones once.
        plan_sha256: Fingerprint of the compression plan; None for a dense model.
        completions: One for each prompt, without the prompt.
    """

    label: str
    source: str
    num_parameters: int
    plan_sha256: str | None
    completions: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """The completions of several models, as ``examples.json``.

    Args:
        protocol: How they were made.
        prompts: What was completed.
        models: One column each.
        schema_version: Version of the names in ``examples.json``.
    """

    protocol: GenerationProtocol
    prompts: "tuple[Prompt, ...]"
    models: tuple[ModelCompletions, ...]
    schema_version: int = SCHEMA_VERSION


def complete(
    model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, max_new_tokens: int
) -> str:
    """Completes a prompt greedily, also where the checkpoint's own settings ask for sampling, beams or penalties.

    Args:
        model: The model, on whatever device it is.
        tokenizer: The model's own.
        prompt: The text to continue.
        max_new_tokens: Longest completion; an end-of-sequence token ends it earlier.

    Returns:
        The new text only, without special tokens.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    # The defaults are named too: whatever a checkpoint's own generation_config asks for must not change the protocol.
    with evaluation_mode(model):
        output = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def to_json(examples: Examples) -> str:
    """The text of ``examples.json``."""
    record = asdict(examples)
    record = {"schema_version": record.pop("schema_version"), **record}
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(examples: Examples) -> str:
    """A table with a row for each prompt and a column for each model, then what the models are."""
    heads = ["Prompt", *(model.label for model in examples.models)]
    asked = [_asked(prompt) for prompt in examples.prompts]
    rows = zip(asked, *(model.completions for model in examples.models), strict=True)
    protocol = examples.protocol
    templated = any(prompt["instruction"] for prompt in examples.prompts)
    template = " The models read an instruction in Alpaca's prompt, as in `examples.json`." if templated else ""
    parts = [
        "# Examples",
        "\n".join([_line(heads), "|" + "---|" * len(heads), *map(_line, rows)]),
        f"Greedy, at most {protocol.max_new_tokens} new tokens, {protocol.dtype} ({protocol.precision}).{template}",
        "\n".join(_identity(model) for model in examples.models),
    ]
    return "\n\n".join(parts) + "\n"


# As entities these are text and nothing else in every dialect of Markdown, also a pipe in a table.
_ACTIVE = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*_[]~|$"})


def safe_cell(text: str) -> str:
    """A text as one cell of a Markdown table: the reader sees its characters, none of them is markup."""
    lines = html.escape(text.strip(), quote=False).translate(_ACTIVE).splitlines()
    shown = "<br>".join(lines).expandtabs(4)
    # A small model may write any byte; one that steers a terminal shows as unknown.
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" else c for c in shown)


def _asked(prompt: "Prompt") -> str:
    """A prompt as a reader wants it: without what Alpaca's template puts around an instruction."""
    instruction = prompt["instruction"]
    return f"{instruction}\n{prompt['input']}" if instruction else prompt["prompt"]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(safe_cell(cell) or "*(nothing)*" for cell in cells) + " |"


def _identity(model: ModelCompletions) -> str:
    plan = "no plan" if model.plan_sha256 is None else f"plan {model.plan_sha256[:12]}"
    size = f"{model.num_parameters / 1e6:,.1f} M parameters"
    return f"- {safe_cell(model.label)}: {safe_cell(model.source)}, {size}, {plan}"
