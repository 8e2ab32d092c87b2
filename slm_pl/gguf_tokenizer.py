"""What GGUF says of a tokenizer, so that llama.cpp cuts text into the same tokens as transformers.

llama.cpp has programs of its own for the ways to cut text, and a GGUF file names one of them. Which one fits is read
from the parts of the tokenizer, not from the name of a model: whatever made the checkpoint may have changed them.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# What cuts a text before pairs are merged, whether a word that is a token stays whole, and llama.cpp's name for it.
_CUTS: list[tuple[list[dict[str, object]], bool, str]] = [
    ([_BYTE_LEVEL], False, "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL], False, "smollm"),
    (
        [
            {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False},
            {**_BYTE_LEVEL, "use_regex": False},
        ],
        True,
        "llama-bpe",
    ),
]
_SPACE = "\u2581"
_ALLOWED = (
    "Allowed are byte-level BPE that cuts text as GPT-2, SmolLM or Llama 3 do, and BPE with bytes to fall back on as "
    "Llama 2 has it. Convert the directory with llama.cpp's own convert_hf_to_gguf.py, which knows more of them."
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the words of GGUF.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for that of SentencePiece.
        pre: How text is cut before pairs are merged.
        tokens: Of all ids.
        types: What each is, as ``gguf.TokenType``.
        scores: Of each; None where merges say the order.
        space_first: Whether a space is put in front of a text.
        caution: How the first tokens of some texts differ all the same; None if they do not.
        add_bos: Whether a text begins with the beginning-of-sequence token.
        add_eos: Whether it ends with the end-of-sequence token.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    space_first: bool
    caution: str | None
    add_bos: bool
    add_eos: bool


def read_vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int) -> Vocabulary:
    """Finds llama.cpp's counterpart of a tokenizer.

    Args:
        tokenizer: As transformers loads it.
        size: Rows of the model's embedding.

    Raises:
        UsageError: If there is none that is known to do the same, or the tokenizer has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"The tokenizer is a {type(tokenizer).__name__} without tokenizer.json. {_ALLOWED}")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise UsageError(f"The tokenizer is a {model['type']} (dropout {model.get('dropout')}). {_ALLOWED}")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values()) >= size:
        raise UsageError(
            f"The tokenizer has tokens up to the id {max(vocabulary.values())}, the model's embedding {size} rows. "
            "Get the tokenizer and the weights that belong together."
        )
    by_pieces = bool(model.get("byte_fallback"))
    if by_pieces:
        apart = {*(one["content"] for one in parts["added_tokens"]), tokenizer.unk_token}
        pre, scores = "default", _scores(model, apart)
        space_first, caution = _space_first(parts)
    else:
        pre, space_first, caution, scores = _cut_of(parts), False, None, {}
    tokens, types = _tokens(vocabulary, parts, size, by_pieces, tokenizer.unk_token)
    begins, ends = _added(tokenizer)
    return Vocabulary(
        "llama" if by_pieces else "gpt2",
        pre,
        tokens,
        types,
        [scores.get(token, 0.0) for token in tokens] if by_pieces else None,
        space_first,
        caution,
        begins,
        ends,
    )


def write_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary, directory: Path) -> None:
    """Adds a tokenizer to what a GGUF file says; special tokens and the chat template are read from its directory."""
    import gguf

    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.space_first)
    special = gguf.SpecialVocab(directory, load_merges=vocabulary.scores is None, n_vocab=len(vocabulary.tokens))
    # It guesses these from the post-processor.
    special.add_special_token = {"bos": vocabulary.add_bos, "eos": vocabulary.add_eos}
    special.add_to_gguf(writer, quiet=True)


def _cut_of(parts: dict[str, Any]) -> str:
    """llama.cpp's name for what a byte-level tokenizer does before it merges pairs."""
    found = parts["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    whole_words = bool(parts["model"].get("ignore_merges"))
    for wanted, ignore_merges, name in _CUTS:
        alike = len(steps) == len(wanted) and all(
            {key: step.get(key) for key in one} == one for step, one in zip(steps, wanted, strict=True)
        )
        if alike and ignore_merges == whole_words and parts["normalizer"] is None:
            return name
    shown = json.dumps({"normalizer": parts["normalizer"], "pre_tokenizer": found, "ignore_merges": whole_words})
    raise UsageError(f"llama.cpp's name for the way this tokenizer cuts text is not known here: {shown}. {_ALLOWED}")


def _space_first(parts: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether a tokenizer like SentencePiece's puts a space before a text, in either of two parts; and a caution."""
    normalizer, cut = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not cut and steps in ([replace], [{"type": "Prepend", "prepend": _SPACE}, replace]):
        return len(steps) == 2, None
    scheme = cut.get("prepend_scheme")
    metaspace = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
    if steps or cut != metaspace:
        shown = json.dumps({"normalizer": parts["normalizer"], "pre_tokenizer": parts["pre_tokenizer"]})
        raise UsageError(f"llama.cpp has nothing that treats spaces as this tokenizer does: {shown}. {_ALLOWED}")
    if scheme == "never":
        return False, None
    return True, (
        "llama.cpp puts a space in front of every text, as SentencePiece does; transformers leaves out that of a text "
        "which begins with a space, so there the first tokens differ."
    )


def _scores(model: dict[str, Any], apart: Collection[str | None]) -> dict[str, float]:
    """Scores that order the tokens as the merges do.

    SentencePiece merges the two neighbours whose token scores highest, whichever way it is put together. Merges say the
    same if they name every way, and all ways to a token one after the other.

    Args:
        model: The part of tokenizer.json that merges.
        apart: Tokens that are no pieces of text: those that were added, and the unknown one.
    """
    merges = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    scores: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token in scores and token != last:
            raise UsageError(f"The tokenizer merges {token!r} at several ranks, which no score says. {_ALLOWED}")
        scores.setdefault(token, -float(rank))
        last = token
    named, vocabulary = set(merges), model["vocab"]
    for token in scores:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in named and all(part in vocabulary for part in pair):
                raise UsageError(f"The tokenizer never merges {pair} into {token!r}, llama.cpp would. {_ALLOWED}")
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    for token in vocabulary.keys() - scores.keys() - {*apart, *every_byte}:
        if len(token) > 1:
            raise UsageError(f"In the tokenizer no merge makes {token!r}, llama.cpp would. {_ALLOWED}")
    lacking = [byte for byte in every_byte if byte not in vocabulary]
    if lacking:
        raise UsageError(f"The tokenizer lacks {len(lacking)} of the 256 bytes, such as {lacking[0]}. {_ALLOWED}")
    return scores


def _tokens(
    vocabulary: dict[str, int], parts: dict[str, Any], size: int, by_pieces: bool, unknown: str | None
) -> tuple[list[str], list[int]]:
    """The token of each id, and what it is; ids that the tokenizer does not use have names of their own."""
    from gguf import TokenType

    tokens, types = [f"[PAD{index}]" for index in range(size)], [int(TokenType.UNUSED)] * size
    kinds: dict[str, TokenType] = {}
    if by_pieces:
        kinds = {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    for one in parts["added_tokens"]:
        kinds[one["content"]] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    if by_pieces and unknown is not None:
        kinds[unknown] = TokenType.UNKNOWN
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, int(kinds.get(token, TokenType.NORMAL))
    return tokens, types


def _added(tokenizer: "PreTrainedTokenizerBase") -> tuple[bool, bool]:
    """Whether the tokenizer puts its begin and its end around a text."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    around = tokenizer("a").input_ids
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in (False, True):
        for after in (False, True):
            if around == begin * before + plain + end * after:
                return before, after
    raise UsageError(
        f"The tokenizer puts the tokens {around} around {plain}, which are not its begin {begin} and its end "
        f"{end}. {_ALLOWED}"
    )
