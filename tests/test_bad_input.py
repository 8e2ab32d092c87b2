"""Whatever a file holds: it is read, or refused with its name; never anything else, and never for long."""

import contextlib
import copy
import faulthandler
import io
import itertools
import json
import os
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from callbacks import FLAP
from slm_pl.cli import main
from slm_pl.compression import surgery
from slm_pl.compression.feasibility import check
from slm_pl.compression.plan import Base, Calibration, DropLayers, KeepChannels, MergeLayers, Method, Plan, RefitOutput
from slm_pl.data import AlpacaDataModule, CalibrationSet, CalibrationText, load_calibration
from slm_pl.data.rows import read_rows
from slm_pl.errors import UsageError
from slm_pl.export import save_compressed
from slm_pl.loading import load_model, load_tokenizer, resolve
from slm_pl.parts import read
from slm_pl.results import Results
from slm_pl.trainer import read_checkpoint
from tests.helpers.pico import pico_model
from tests.helpers.records import record_of
from tests.helpers.tokenizer import pico_tokenizer

INPUTS = int(os.environ.get("SLM_PL_INPUTS", "40"))
"""How many each test makes; there are 22 of them."""
SLOW = settings(
    deadline=None,  # what never ends is ended by `within`, and other programs may slow this one
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    derandomize=True,
    database=None,
    print_blob=False,
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["../../etc/passwd", "a\0b", "\ud800", "1e999", "plan.json", "os.system", "embedded", -1, 0, 10**400]
    )
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: object, at: tuple = ()) -> list[tuple]:
    """The paths of all values of a document."""
    found = [at]
    if isinstance(value, dict):
        found += [place for name, part in value.items() for place in places(part, (*at, name))]
    elif isinstance(value, list):
        found += [place for index, part in enumerate(value) for place in places(part, (*at, index))]
    return found


def changed(document: object, place: tuple, value: object, how: str) -> object:
    """A copy of a document in which one value is another one, is gone, or has a neighbour."""
    if not place:
        return value
    document = copy.deepcopy(document)
    holder = document
    for step in place[:-1]:
        holder = holder[step]
    if how == "remove":
        del holder[place[-1]]
    elif how == "add" and isinstance(holder, dict):
        holder[str(value)[:9]] = value
    elif how == "add":
        holder.insert(place[-1], value)
    else:
        holder[place[-1]] = value
    return document


def documents(valid: object) -> st.SearchStrategy:
    """Documents that are right but for one or two places, and some that are nothing."""
    change = st.tuples(st.sampled_from(places(valid)), JSON, st.sampled_from(["set", "set", "remove", "add"]))
    one = change.map(lambda c: changed(valid, *c))

    def twice(document: object) -> st.SearchStrategy:
        return st.tuples(st.sampled_from(places(document)), JSON).map(lambda c: changed(document, *c, "set"))

    return one | one.flatmap(twice) | JSON


def dump(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def damaged(content: bytes) -> st.SearchStrategy:
    """A file with a bit flipped, cut off, or with other bytes in it."""
    place = st.integers(0, max(0, len(content) - 1))
    flip = st.tuples(place, st.integers(0, 7)).map(
        lambda c: content[: c[0]] + bytes([content[c[0]] ^ (1 << c[1])]) + content[c[0] + 1 :]
    )
    cut = place.map(lambda at: content[:at])
    put = st.tuples(place, st.binary(min_size=1, max_size=9)).map(lambda c: content[: c[0]] + c[1] + content[c[0] :])
    return flip | flip | cut | put


PLAN = Plan(
    Base("x/y", None, "llama", 6, 79264, "ab"),
    Method("callbacks.Some", {"remove_layers": 2, "nested": {"a": [1, 2.5]}}),
    Calibration("embedded", 2, 16, 1234, "cd"),
    (MergeLayers(1, 2), DropLayers((4,)), KeepChannels(0, "mlp", tuple(range(8))), RefitOutput(5, "mlp", "w")),
    ({"low": 1, "high": 2, "similarity": 0.5, "accepted": True},),
    {"layers_left": 4},
)
CONFIG = {
    "parts": [],
    "config_version": 1,
    "model": {"pretrained": "x", "lora": {"r": 8}},
    "data": {"path": "embedded", "calibration": {"samples": 2}},
    "trainer": {"max_steps": 1, "callbacks": [{"class_path": "callbacks.SLEB", "init_args": {"remove_layers": 1}}]},
}
SWEEP = {
    "output_dir": "runs/x",
    "model": {"pretrained": "x", "dtype": "float32"},
    "data": {"path": "embedded", "calibration": {"samples": 2}},
    "methods": {"sleb": {"class_path": "callbacks.SLEB"}, "two": [{"class_path": "callbacks.FLAP"}] * 2},
    "ratios": [0.2],
    "seeds": [1],
    "measure": [{"class_path": "callbacks.Perplexity", "init_args": {"texts": [{"max_tokens": 512}]}}],
    "recovery": {"trainer": {"max_steps": 1}},
}
LAST = ["--print_config"]
"""What keeps a command from being run."""
ROW = {"instruction": "Say it", "input": "", "output": "it"}
TOKENIZER = pico_tokenizer()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends this process, and tells where it was, if the block does not end, even in code that is not Python."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def refused_or_read(reader: Callable[[], object], *named: object) -> object:
    """What a reader returns; None if it refuses, in one message that names the file."""
    try:
        return reader()
    except UsageError as error:
        said = str(error)
        assert said.strip()
        for name in named:
            assert str(name) in said, said
        return None


def read_plan(path: Path) -> object:
    return refused_or_read(lambda: Plan.load(path), path)


def read_results(path: Path) -> object:
    return refused_or_read(lambda: Results.load(path), path)


def read_config(path: Path) -> object:
    return None if refused_or_read(lambda: read(path)) is None else ended_well(["fit", "--config", str(path), *LAST])


def read_ids(path: Path) -> object:
    return refused_or_read(
        lambda: load_calibration(CalibrationText(str(path), samples=1, sequence_length=4), TOKENIZER)
    )


def read_alpaca(path: Path) -> object:
    return refused_or_read(lambda: list(read_rows(str(path))), path)


def read_prompts(path: Path) -> object:
    module = AlpacaDataModule("embedded", prompts=str(path))
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=TOKENIZER))
    return refused_or_read(lambda: module._read_prompts(path))


def read_sweep(path: Path) -> object:
    return ended_well(["sweep", "--config", str(path), "--dry_run"])


def ended_well(arguments: list[str]) -> object:
    """What a command says; None if it refuses its arguments, in one message and without a traceback."""
    said, failed, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
        try:
            main(arguments)
        except SystemExit as done:
            code = done.code
    if code in (0, None):
        return said.getvalue()
    assert code in (1, 2)
    assert failed.getvalue().count("error: ") == 1, failed.getvalue()
    assert "Traceback" not in failed.getvalue()
    return None


@pytest.mark.parametrize("place", [("data",), ("seeds",), ("recovery", "trainer")])
def test_null_in_a_sweep_is_what_is_left_out(place, tmp_path):
    path = tmp_path / "sweep.yaml"
    said = []
    for how in ("set", "remove"):
        path.write_bytes(dump(changed(SWEEP, place, None, how)))
        said.append(read_sweep(path))
    assert said[0] is not None
    assert said[0] == said[1]


def as_lines(rows: object) -> bytes:
    return b"\n".join(map(dump, rows if isinstance(rows, list) else [rows]))


def as_yaml(value: object) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", errors="surrogatepass")


RECORD = record_of("pruned", plan="ab").to_dict()
FORMS = {
    "plan": (json.loads(PLAN.to_json()), dump, "plan.json", read_plan),
    "results": (RECORD, dump, "results.json", read_results),
    "config": (CONFIG, dump, "config.yaml", read_config),
    "ids": ([[1, 2, 3, 4], [5, 6, 7, 8]], dump, "ids.json", read_ids),
    "text": ([{"text": "so many words in here"}, {"text": "more"}], as_lines, "text.jsonl", read_ids),
    "alpaca": ([ROW, ROW], dump, "alpaca.json", read_alpaca),
    "alpaca lines": ([ROW, ROW], as_lines, "alpaca.jsonl", read_alpaca),
    "prompts": ([ROW, ROW], as_lines, "prompts.jsonl", read_prompts),
    "sweep": (SWEEP, dump, "sweep.yaml", read_sweep),
}


def attack(name: str, how: str, number: int, directory: Path) -> tuple[int, int]:
    """Gives a reader documents with wrong values, or damaged files; how many were read, and how many refused."""
    read, refused = 0, 0
    valid, write, file, reader = FORMS[name]
    path = directory / file
    path.write_bytes(write(valid))
    assert reader(path) is not None  # else nothing is tested
    contents = documents(valid).map(write) if how == "values" else damaged(write(valid))

    @settings(SLOW, max_examples=number)
    @given(contents)
    def run(content: bytes) -> None:
        nonlocal read, refused
        path.write_bytes(content)
        with within(60):
            found = reader(path)
        if found is None:
            refused += 1
        else:
            read += 1

    run()
    return read, refused


HOW = ["values", "bytes"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FORMS)
def test_read_or_refused(name, how, tmp_path):
    read, refused = attack(name, how, INPUTS, tmp_path)
    assert refused > 0  # what is wrong is told
    assert read + refused >= INPUTS


def with_text(name: str, old: str, new: str) -> bytes:
    """The right document of a form, in the text of which something is another."""
    valid, write, *_ = FORMS[name]
    text = write(valid).decode()
    assert old in text
    return text.replace(old, new, 1).encode()


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


LONG_NUMBER = "1" * 5000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
LATER = [
    *(
        ("plan", with_text("plan", f'"{field}": {old}', f'"{field}": {new}'))
        for field, old, new in (
            ("num_parameters", 79264, 0),
            ("num_parameters", 79264, 10**400),
            ("num_parameters", 79264, 10**20),
            ("num_layers", 6, 0),
            ("num_layers", 6, 10**9),
            ("revision", "null", 5),
            ("revision", "null", '["x"]'),
            ("pretrained", '"x/y"', json.dumps("a" * 5000)),
            ("pretrained", '"x/y"', r'"\ud800"'),
            ("remove_layers", 2, r'"\udfff"'),
            ("remove_layers", 2, deep(700)),
            ("high", 2, 10**15),
            ("layers", "[4]", "[-1]"),
            ("weight", '"w"', json.dumps("w" * 5000)),
            ("schema_version", 1, '1, "tensors_sha256": []'),
        )
    ),
    *(
        ("results", with_text("results", f'"{field}": {old}', f'"{field}": {new}'))
        for field, old, new in (
            ("num_parameters", 80, 10**400),
            ("num_layers", 24, 10**400),
            ("value", 20.0, 10**400),
            ("value", 20.0, -1.0),
            ("value", 20.0, 0),
            ("corpus", '"embedded"', r'"\ud800"'),
            ("schema_version", 1, f'1, "x": {deep(990)}'),
            ("schema_version", 1, f'1, "sha256": "ab", "x": {deep(990)}'),
        )
    ),
    *(
        (name, with_text(name, old, f'{old}, "x": {value}'))
        for name, old in (("text", '"more"'), ("alpaca lines", '"it"'), ("prompts", '"it"'))
        for value in (LONG_NUMBER, deep(5000))
    ),
    ("alpaca", with_text("alpaca", '"it"', f'"it", "x": {LONG_NUMBER}')),
    ("ids", with_text("ids", "4", LONG_NUMBER)),
    ("ids", deep(5000).encode()),
    ("config", BOMB.encode()),
    ("config", f"a: {deep(3000)}".encode()),
    ("config", b"a: &a [1, *a]"),
    ("sweep", dump(changed(SWEEP, ("data", "calibration"), True, "set"))),
    ("sweep", dump(changed(SWEEP, ("data",), {"class_path": "slm_pl.data.AlpacaDataModule", "init_args": "x"}, "set"))),
    ("sweep", dump(changed(SWEEP, ("methods", "sleb", "init_args"), [1], "set"))),
    ("sweep", BOMB.encode()),
    ("sweep", f"a: {deep(3000)}".encode()),
]


@pytest.mark.parametrize(("name", "content"), LATER, ids=lambda part: part if isinstance(part, str) else "")
def test_what_would_fail_later_or_never_end_is_refused_when_it_is_read(name, content, tmp_path):
    *_, file, reader = FORMS[name]
    path = tmp_path / file
    path.write_bytes(content)
    before = time.monotonic()
    assert reader(path) is None
    assert time.monotonic() - before < 5


OPTIONS = [
    *(
        "--config",
        "-c",
        "--print_config",
        "--no_such_option",
        "--overwrite",
        "--ratio",
        "--ckpt_path",
        "--weights_only",
    ),
    *("--model.pretrained", "--model.lora", "--model.lora.r", "--model.dtype", "--data", "--data.path", "--data.split"),
    *("--trainer.max_steps", "--trainer.callbacks", "--trainer.callbacks+", "--trainer.devices", "--seed_everything"),
    *("--trainer.default_root_dir", "--trainer.precision", "--config_version", "--baseline", "--to", "--output_dir"),
]
WORDS = (
    SCALARS.map(str).map(lambda text: text.replace("\0", ""))  # no argument of a process holds it
    | JSON.map(lambda value: dump(value).decode(errors="replace"))
    | st.sampled_from(["callbacks.SLEB", "os.system", "slm_pl.data.AlpacaDataModule", "last", "16", "configs", "=", ""])
)


@settings(SLOW, max_examples=INPUTS)
@given(
    st.sampled_from(["fit", "test", "prune", "compare", "estimate", "sweep", "export", "merge", ""]),
    st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS).map(list) | WORDS.map(lambda word: [word]), max_size=4),
)
def test_any_arguments_are_taken_or_refused_in_one_message(command, given):
    last = {"compare": [], "estimate": [], "export": [], "sweep": ["--dry_run"]}  # these only read
    with within(60):
        ended_well([command, *itertools.chain(*given), *last.get(command, LAST)])


@pytest.mark.parametrize(("form", "name"), [(PLAN, "plan.json"), (record_of("pruned", plan="ab"), "results.json")])
def test_a_sealed_file_with_a_flipped_bit_is_refused_or_says_the_same(form, name, tmp_path):
    path = tmp_path / name
    form.save(path)
    reader = type(form).load
    content, expected = path.read_bytes(), reader(path)
    refused = 0
    for at in range(len(content)):
        for bit in range(0, 8, 3):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
            found = refused_or_read(lambda: reader(path), path)
            refused += found is None
            assert found is None or found == expected, (at, bit)
    assert refused > 2.5 * len(content)  # of three times its length; spaces and line ends may change


# Steps


def steps() -> st.SearchStrategy:
    index = st.integers(-2, 8)
    indices = st.lists(st.integers(-1, 70), max_size=6).map(tuple)
    return st.lists(
        st.builds(MergeLayers, index, index, st.sampled_from(["keep_top", "keep_bottom", "sum", "mean"]))
        | st.builds(DropLayers, st.lists(index, max_size=6).map(tuple))
        | st.builds(KeepChannels, index, st.sampled_from(["attention", "mlp"]), indices)
        | st.builds(RefitOutput, index, st.sampled_from(["attention", "mlp"]), st.sampled_from(["w", "nothing"])),
        max_size=4,
    ).map(tuple)


@settings(SLOW, max_examples=INPUTS)
@given(steps())
def test_a_plan_with_any_steps_is_carried_out_or_refused_before_anything_changes(chosen):
    from dataclasses import replace

    model = pico_model()
    plan = replace(PLAN, base=Base.of(model), steps=chosen).with_tensors({"w": torch.zeros(3, 3)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        check(model, plan)
    except UsageError:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    surgery.apply(model, plan)
    assert torch.isfinite(model(torch.arange(3, 9)[None]).logits).all()


# Weights


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """An export of layers that differ in width, so that there are several plans' kinds of files in it."""
    model = pico_model()
    samples = CalibrationSet.from_ids([list(range(3, 19)), list(range(20, 36))], CalibrationText(samples=2))
    plan = FLAP(ratio=0.2).plan(model, samples)
    surgery.apply(model, plan)
    directory = tmp_path_factory.mktemp("exported") / "export"
    save_compressed(model, pico_tokenizer(), directory, [plan], recovered=False)
    return directory


def load_all(directory: Path) -> None:
    source = resolve(str(directory))
    load_model(source)
    load_tokenizer(source)


def test_an_export_with_a_damaged_file_is_refused_with_its_name(export, tmp_path):
    load_all(export)
    generator = random.Random(3)
    copy_of = tmp_path / "copy"
    copy_of.mkdir()
    names = [path.name for path in export.iterdir() if path.suffix not in (".md", ".png", ".svg")]
    assert {"model.safetensors", "config.json", "tokenizer.json", "plan.json", "slm_pl.sha256"} <= set(names)
    tried = 0
    for name in names:
        for other in export.iterdir():
            (copy_of / other.name).unlink(missing_ok=True)
            os.link(other, copy_of / other.name)
        content = (export / name).read_bytes()
        for how in ("flip", "flip", "flip", "cut", "gone"):
            at = generator.randrange(len(content))
            if how == "gone" and name in ("slm_pl.sha256", "config.json"):
                continue  # then nothing says what there was, or that it is a checkpoint
            (copy_of / name).unlink(missing_ok=True)
            if how != "gone":
                flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
                (copy_of / name).write_bytes(flipped if how == "flip" else content[:at])
            tried += 1
            if how == "cut" and name == "slm_pl.sha256":
                continue  # at the end of a line, it is a shorter list
            with pytest.raises(UsageError) as caught:
                load_all(copy_of)
            named = name if name != "slm_pl.sha256" else copy_of.name
            assert named in str(caught.value), caught.value
    assert tried > 30


def test_a_damaged_checkpoint_is_refused_or_says_the_same(tmp_path):
    path = tmp_path / "some.ckpt"
    state = {
        "state_dict": {"a": torch.randn(40, 3), "b": torch.arange(7)},
        "optimizer_states": [{"step": 3}],
        "plans": ["x"],
    }
    torch.save(state, path)
    content = path.read_bytes()

    @settings(SLOW, max_examples=INPUTS)
    @given(damaged(content))
    def run(other: bytes) -> None:
        path.write_bytes(other)
        found = refused_or_read(lambda: read_checkpoint(path), path)
        assert found is None or {**found, "state_dict": 0} == {**state, "state_dict": 0}
        assert found is None or all(torch.equal(found["state_dict"][k], v) for k, v in state["state_dict"].items())

    run()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}X\x01\x00",  # cut off in the length of a text
        b"\x80\x02h\x05.",  # a value that was not kept before
        b"\x80\x02}",  # without an end
        b"\x80\x02e.",  # a list to add to that is not there
    ],
)
def test_a_checkpoint_that_only_its_maker_could_have_damaged_is_refused(pickled, tmp_path):
    torch.save({"a": 1}, tmp_path / "whole.ckpt")
    path = tmp_path / "made.ckpt"
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(path, "w") as made:
        for name in whole.namelist():
            made.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(UsageError, match=f"{path} is damaged .*--ckpt_path"):
        read_checkpoint(path)


def test_damaged_weights_without_sums_are_read_or_refused(tmp_path):
    """As any checkpoint of the Hub: nothing tells that a bit of a weight is another, but the form is looked at."""
    pico_model(num_hidden_layers=1).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    header = content[:2000]

    @settings(SLOW, max_examples=INPUTS)
    @given(damaged(header))
    def run(other: bytes) -> None:
        path.unlink()
        path.write_bytes(other + content[2000:])
        refused.append(refused_or_read(lambda: load_model(resolve(str(tmp_path))), tmp_path) is None)

    refused: list[bool] = []
    run()
    assert len(refused) >= INPUTS
    assert sum(refused) > INPUTS / 2  # a damaged header seldom means anything
