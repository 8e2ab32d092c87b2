import pytest

from slm_pl.data.embedded import topic_texts
from slm_pl.errors import UsageError
from slm_pl.evaluation.efficiency.prompts import Prompts
from slm_pl.evaluation.efficiency.runs import Runner, Switches
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.evaluation.efficiency.helpers import record_generation

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["The tower", "A decoder layer that does nearly the same as its neighbour", "Describe the function"]


def prose():
    return pico_tokenizer()("\n\n".join(topic_texts("heldout")), add_special_tokens=False)["input_ids"]


# --- Prose of a length ---


@pytest.mark.parametrize("tokens", [1, 2, 12, 511])
@pytest.mark.parametrize("add_bos", [False, True])
def test_exact_length(tokens, add_bos):
    batch = Prompts(pico_tokenizer(add_bos=add_bos)).batch(3, tokens)
    assert batch.ids.shape == batch.mask.shape == (3, tokens)
    assert batch.mask.min() == 1
    expected = [0, *prose()] if add_bos else prose()
    assert batch.ids[0].tolist() == expected[:tokens]
    if tokens > 2:
        assert len({tuple(row) for row in batch.ids.tolist()}) == 3
    if add_bos:
        assert batch.ids[:, 0].tolist() == [0, 0, 0]
        assert 0 not in batch.ids[:, 1:]


@pytest.mark.parametrize("more", [-1, 0, 5])
def test_longer_than_the_whole_prose(more):
    text = prose()
    tokens = 2 * len(text) + more
    batch = Prompts(pico_tokenizer()).batch(2, tokens)
    assert batch.ids[0].tolist() == (3 * text)[:tokens]
    start, twice = batch.ids[1, :50].tolist(), text + text
    assert any(twice[at : at + 50] == start for at in range(len(text)))
    assert start != text[:50]


def test_a_passage_for_every_row_of_a_large_batch():
    # As many tokens as divide the prose would begin again after a few rows.
    whole = len(prose())
    tokens = next(length for length in range(200, whole) if whole % length == 0 or length > 400)
    ids = Prompts(pico_tokenizer()).batch(256, tokens).ids
    assert len({tuple(row) for row in ids.tolist()}) == 256


def test_the_same_prompts_for_every_model():
    first, second = (Prompts(pico_tokenizer()).batch(4, 20).ids for _ in range(2))
    assert first.tolist() == second.tolist()


# --- Texts ---


@pytest.mark.parametrize("add_bos", [False, True])
def test_texts_in_turn_padded_on_the_left(add_bos):
    tokenizer = pico_tokenizer(add_bos=add_bos)
    own = [([0] if add_bos else []) + pico_tokenizer()(text)["input_ids"] for text in TEXTS]
    length = max(map(len, own))
    assert len({len(row) for row in own}) == 3
    batch = Prompts(tokenizer, TEXTS).batch(5, None)
    for row, (ids, mask) in enumerate(zip(batch.ids.tolist(), batch.mask.tolist(), strict=True)):
        text = own[row % 3]
        padding = length - len(text)
        assert ids == [2] * padding + text
        assert mask == [0] * padding + [1] * len(text)


def test_length_of_the_texts_in_a_batch():
    lengths = [len(pico_tokenizer()(text)["input_ids"]) for text in TEXTS]
    prompts = Prompts(pico_tokenizer(), TEXTS)
    assert lengths[1] > max(lengths[0], lengths[2])
    assert [prompts.text_tokens(batch_size) for batch_size in (1, 2, 3, 7)] == [lengths[0], *[lengths[1]] * 3]
    for batch_size in (1, 2, 7):
        assert prompts.batch(batch_size, None).ids.shape == (batch_size, prompts.text_tokens(batch_size))


def test_tokenizer_without_padding_token():
    tokenizer = pico_tokenizer()
    tokenizer.pad_token = None
    batch = Prompts(tokenizer, TEXTS).batch(2, None)
    assert set(batch.ids[batch.mask == 0].tolist()) == {0}


@pytest.mark.parametrize("model_type", ["llama", "bloom", "opt", "mistral"])
def test_padded_rows_continue_as_they_do_alone(model_type, monkeypatch):
    """Whether positions are rotated, learned, or added to the scores, and with a window shorter than the padding."""
    model = pico_model(model_type)
    calls = record_generation(model, monkeypatch)
    batch = Prompts(pico_tokenizer(), TEXTS).batch(3, None)
    Runner(model, batch, 6, "greedy", Switches(), 2).timed(0)
    together = calls[0][1].sequences[:, batch.ids.shape[1] :].tolist()
    for row, text in enumerate(TEXTS):
        ids = pico_tokenizer()(text, return_tensors="pt").input_ids
        alone = model.generate(input_ids=ids, do_sample=False, min_new_tokens=6, max_new_tokens=6, pad_token_id=2)
        assert together[row] == alone[0, ids.shape[1] :].tolist()
    assert len({tuple(row) for row in together}) > 1


@pytest.mark.parametrize("texts", [[], [""], ["The tower", ""]])
def test_no_token_to_start_from(texts):
    with pytest.raises(UsageError, match="without a single token"):
        Prompts(pico_tokenizer(), texts)
