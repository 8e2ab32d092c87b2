"""Instructions as the text that a model continues, and as token ids with labels on the response only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

from slm_pl.data.batching import IGNORED_LABEL
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptStyle = Literal["alpaca", "chat"]

# The published prompts of Stanford Alpaca; the line end behind "Response:" is that of the recovery recipes
# (alpaca-lora, LLM-Pruner), and keeps the first word of the response apart from the prompt.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class Prompt(TypedDict):
    """What the module continues in ``predict``: ``prompt``; the other two are "" for a prompt that was given whole."""

    prompt: str
    instruction: str
    input: str


def alpaca_prompt(instruction: str, input_text: str = "") -> str:
    """Stanford Alpaca's prompt, up to where the response begins.

    Args:
        instruction: What to do.
        input_text: What to do it with; "" selects the template without input.
    """
    # not chained replacements: an instruction may itself contain "{input}"
    if input_text:
        return _WITH_INPUT.format(instruction=instruction, input=input_text)
    return _WITHOUT_INPUT.format(instruction=instruction)


def render(
    style: PromptStyle,
    tokenizer: "PreTrainedTokenizerBase",
    instruction: str,
    input_text: str = "",
    output: str | None = None,
) -> str:
    """An instruction as text: the prompt, and the response if there is one.

    The chat template is the tokenizer's own; the instruction and its input are the user's turn. The text is to be
    tokenised with special tokens, so a BOS that a template writes itself is left out where the tokenizer adds one.

    Raises:
        UsageError: If a chat template is asked for and the tokenizer has none, or refuses the conversation.
    """
    if style == "alpaca":
        return alpaca_prompt(instruction, input_text) + (output or "")
    if not tokenizer.chat_template:
        raise UsageError(
            "data.prompt is 'chat', but this model's tokenizer has no chat template: it is a base model. Use "
            "data.prompt: alpaca, or an instruct model."
        )
    turns = [{"role": "user", "content": f"{instruction}\n\n{input_text}" if input_text else instruction}]
    if output is not None:
        turns.append({"role": "assistant", "content": output})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=output is None)
    except Exception as error:  # a template is a program of its own
        raise UsageError(
            f"The tokenizer's chat template fails with {type(error).__name__}: {error}. Use data.prompt: alpaca."
        ) from error
    assert isinstance(text, str)
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos and bos else text


def encode(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], wholes: Sequence[str], cutoff: int
) -> list[tuple[list[int], list[int]] | None]:
    """Token ids and labels; the loss counts the response and the EOS behind it.

    Prompt and response are tokenised together, as text that the model meets elsewhere; a token that spans the boundary
    counts as response.

    Args:
        tokenizer: The model's.
        prompts: Texts up to where the response begins.
        wholes: The same with the response.
        cutoff: Most tokens; what is longer is truncated and learns no EOS.

    Returns:
        For each text the ids and the labels; None where the prompt alone fills the cutoff.
    """
    eos = tokenizer.eos_token_id
    # verbose=False: what is longer than the model's context is truncated below, there is nothing to warn of
    heads = tokenizer(list(prompts), verbose=False)["input_ids"]
    found: list[tuple[list[int], list[int]] | None] = []
    for head, ids in zip(heads, tokenizer(list(wholes), verbose=False)["input_ids"], strict=True):
        start = _common_prefix(head, ids)
        if start >= cutoff:
            found.append(None)
            continue
        if eos in ids[start:]:  # a chat template ends the turn by itself, some with a line end behind it
            last = len(ids) - ids[::-1].index(eos)
            ids = ids[:last] if not str(tokenizer.decode(ids[last:])).strip() else [*ids, eos]
        else:
            ids = [*ids, eos]
        ids = ids[:cutoff]
        found.append((ids, [IGNORED_LABEL] * start + ids[start:]))
    return found


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading items that are equal."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))
