import base64
import dataclasses
import re

import pytest

from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, DropLayers, Method, Plan
from slm_pl.export import save_compressed
from slm_pl.layer_map import layer_parameters
from slm_pl.report import compare, exports
from tests.helpers.pico import pico_model
from tests.helpers.records import record_of
from tests.helpers.tokenizer import pico_tokenizer


@pytest.fixture
def measured(tmp_path):
    """A dense record and one of an export: their files, and the export."""
    model = pico_model()
    dense = layer_parameters(model)
    plan = Plan(Base.of(model), Method("callbacks.SLEB", {}), None, (DropLayers((1,)),))
    surgery.apply(model, plan)
    export = save_compressed(model, pico_tokenizer(), tmp_path / "export", [plan], False, dense_layers=dense)
    records = [record_of("dense"), record_of("pruned|<b>", plan.sha256, perplexity=25.0)]
    records[1].model = dataclasses.replace(records[1].model, source=str(export))
    files = []
    for record, name in zip(records, ("dense", "pruned"), strict=True):
        (tmp_path / name).mkdir()
        record.save(tmp_path / name / "results.json")
        files.append(str(tmp_path / name / "results.json"))
    return files, export


def maps_of(directory):
    page = (directory / "comparison.html").read_text()
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]


def test_the_page_shows_the_map_and_cards_are_left_alone(measured, tmp_path):
    files, export = measured
    card = (export / "README.md").read_text()
    compare(files)
    (svg,) = maps_of(tmp_path)
    assert "6 → 5 layers" in svg
    assert svg.count(">removed<") == 1
    page = (tmp_path / "comparison.html").read_text()
    assert "What became of every layer" in page
    assert "pruned|<b>" not in page
    assert (export / "README.md").read_text() == card


def test_cards_get_the_figures_beside_the_dense_model(measured):
    files, export = measured
    for _ in range(2):
        compare(files, cards=True)
    card = (export / "README.md").read_text()
    assert card.count("<!-- slm_pl results -->") == 1
    assert "| | dense | pruned\\|&lt;b> |" in card
    line = next(line for line in card.splitlines() if line.startswith("| Perplexity embedded"))
    assert re.fullmatch(r"\| Perplexity embedded [^|]* \| 20\.0\S* ± 0\.5\S* \| 25\.0\S* ± 0\.5\S*[^|]* \|", line), line
    assert "Ratios are against the dense model." in card
    assert "Not measured yet" not in card


@pytest.mark.parametrize("damage", ["another plan", "corrupt", "gone"])
def test_plans_that_are_not_there_cost_only_the_map(measured, damage, tmp_path, capsys):
    files, export = measured
    plan = export / "plan.json"
    if damage == "gone":
        plan.unlink()
    elif damage == "corrupt":
        plan.write_text(plan.read_text()[:100])
    else:
        other = dataclasses.replace(Plan.load(plan), outcome={"another": 1})
        other.save(plan)
    before = (export / "README.md").read_text()
    compare(files, cards=True)
    assert maps_of(tmp_path) == []
    assert (export / "README.md").read_text() == before
    told = capsys.readouterr().out
    assert "no card" in told
    assert "by now another model" in told
    assert ("cannot be read as a plan" in told) is (damage == "corrupt")


def test_what_the_match_makes_needless_is_not_read(measured, monkeypatch):
    files, export = measured
    read = []
    load = exports.load_plans
    monkeypatch.setattr(
        exports, "load_plans", lambda *args, **kwargs: read.append((args, kwargs)) or load(*args, **kwargs)
    )
    (export / "plan.json").rename(export / "kept.json")
    for directory in (export, export.parent / "pruned"):
        (directory / "plan.json").write_bytes((export / "kept.json").read_bytes())
    compare(files, cards=True)
    assert read == [((export,), {"tensors": False})] * 2  # for maps and cards, and for what is said at the end


def test_a_card_that_is_a_link_is_left_alone(measured, tmp_path, capsys):
    files, export = measured
    (export / "README.md").rename(tmp_path / "blob")
    (export / "README.md").symlink_to(tmp_path / "blob")
    before = (tmp_path / "blob").read_text()
    compare(files, cards=True)
    assert (tmp_path / "blob").read_text() == before
    assert "is a link" in capsys.readouterr().out
