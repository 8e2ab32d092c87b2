"""A tokenizer built in code, so that no test needs a file or a model hub."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SENTENCES = (
    "A decoder layer that does nearly the same as its neighbour can be merged with it.",
    "The calibration set is a handful of short pieces of ordinary English prose.",
    "Describe the function that copies a directory tree and returns its destination.",
    "def main(arguments): return the number of tokens per second for the given prompt",
    "### Instruction: write a response that appropriately completes the request. ### Response:",
)
_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"


@lru_cache
def _serialised(vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def pico_tokenizer(vocab_size: int = 512, *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: encodes and decodes any text with ids below ``vocab_size``.

    Args:
        vocab_size: Upper bound of the ids, at least 259 (256 bytes, BOS, EOS, PAD).
        add_bos: Put BOS in front of every text tokenised with special tokens, as Llama's tokenizer does (the default
            adds none, as SmolLM2's).

    Returns:
        A new tokenizer with ``bos_token_id`` 0, ``eos_token_id`` 1, ``pad_token_id`` 2.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    assert vocab_size >= 259, "256 bytes and three special tokens"
    backend = Tokenizer.from_str(_serialised(vocab_size))
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD)
