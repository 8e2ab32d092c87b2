"""What the page's buttons call, without a browser."""

import dataclasses
from types import SimpleNamespace

import pytest

from slm_pl.compression.plan import Base, DropLayers, Method, Plan
from slm_pl.demo.engine import Absent, DemoModel, Failed
from slm_pl.demo.runs import MOST_MODELS, Runs
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer

pytest.importorskip("gradio")
orjson = pytest.importorskip("orjson")

from slm_pl.demo import page, sights  # noqa: E402
from slm_pl.demo.line import MOST_WAITING  # noqa: E402

SOMEONE = SimpleNamespace(session_hash="someone")
STAYS = (page.gr.skip(), page.gr.skip())


def _served(label, directory=None):
    return DemoModel(label, pico_model(bos_token_id=0, eos_token_id=None, pad_token_id=2), pico_tokenizer(), directory)


def test_a_double_click_has_the_work_done_once(one_thread, monkeypatch):
    models, runs, calls = [_served("a"), _served("b")], Runs(), []
    real = DemoModel._generate
    monkeypatch.setattr(DemoModel, "_generate", lambda self, *args: (calls.append(self.label), real(self, *args))[1])
    begin = page._beginner(runs)
    writers = [page._writer(runs, model, column) for column, model in enumerate(models)]
    first, _ = begin("A decoder", 4, 0, 0, False, SOMEONE)
    second, _ = begin("A decoder", 4, 0, 0, False, SOMEONE)
    # Both clicks' columns read the number when the second click has set it.
    shown = [[list(write(second, SOMEONE)) for write in writers] for _ in range(2)]
    assert calls == ["a", "b"]
    assert all("Done" in column[-1][1] for column in shown[0])
    # Who has nothing to say says that: Gradio would empty the column otherwise.
    assert shown[1] == [[STAYS], [STAYS]]
    assert list(writers[0](first, SOMEONE)) == [STAYS]


def _plan(directory, method="callbacks.SLEB", **base):
    model = pico_model()
    plan = Plan(dataclasses.replace(Base.of(model), **base), Method(method, {}), None, (DropLayers((1,)),))
    directory.mkdir()
    plan.save(directory / "plan.json")
    return directory


def test_a_plan_that_cannot_be_drawn_leaves_the_other_models(tmp_path, monkeypatch):
    good = _plan(tmp_path / "good")
    real = sights.layers_html

    def layers_html(label, *args):
        if label == "odd":
            raise OverflowError("int too large <b>")
        return real(label, *args)

    monkeypatch.setattr(sights, "layers_html", layers_html)
    models = [_served("a", good), _served("odd", good), Absent("gone", "It is <i>not</i> there."), _served("b", good)]
    paint = page._painter(models)
    for _ in range(2):
        first, odd, gone, last = paint()
        assert "<img" in first
        assert "<img" in last
        assert "The layers of odd cannot be shown: OverflowError: int too large &lt;b&gt;" in odd
        assert "It is &lt;i&gt;not&lt;/i&gt; there." in gone


def test_plans_that_cannot_be_read_are_told(tmp_path):
    directory = _plan(tmp_path / "plans")
    (directory / "plan.json").write_text("{}")
    assert "schema_version" in sights.layers_html("a", directory)


def test_what_the_page_shows_can_be_sent_whatever_strangers_wrote():
    half = "\ud800<b>"
    shown = [
        page.show(Failed(half)),
        page._facts(Absent(half, half)),
        page._layers(Absent(half, half)),
        sights.layers_html(half, None),
        sights._cell(half),
    ]
    sent = orjson.dumps(shown).decode()
    assert "<b>" not in sent
    assert sent.count("?&lt;b&gt;") == len(shown)
    page.build([Absent(half, half)], None).get_config_file()


def test_there_is_a_thread_for_whoever_may_wait():
    runs, prompt = Runs(), "x"
    run = runs.begin("someone", prompt, page.Settings())
    places = [run.turns.join() for _ in range(MOST_MODELS * (MOST_WAITING + 1))]
    with pytest.raises(page.UsageError, match="one model at a time is busy"):
        run.turns.join()
    assert len(places) + MOST_MODELS * (MOST_WAITING + 1) < page.MOST_THREADS
