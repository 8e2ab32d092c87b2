import json

import pytest

from callbacks import ZeroShot
from slm_pl.errors import UsageError
from slm_pl.evaluation import EMBEDDED_TASK
from slm_pl.evaluation.harness import task_content
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_samples_are_left_in_the_run_directory(pico_dir, tmp_path):
    hook = ZeroShot([EMBEDDED_TASK], limit=6, log_samples=True)
    make_trainer(tmp_path / "run", hook).test(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    record = json.loads((tmp_path / "run" / "results.json").read_text())["zero_shot"]
    lines = (tmp_path / "run" / f"samples_{EMBEDDED_TASK}.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [one["doc_id"] for one in samples] == list(range(6))
    # Each sample says by its likelihoods whether it was answered right; their mean is the figure.
    right = [
        max(range(4), key=lambda choice, one=one: one["resps"][choice][0][0]) == one["doc"]["label"] for one in samples
    ]
    assert [one["acc"] for one in samples] == right
    assert record["tasks"][EMBEDDED_TASK]["value"] == pytest.approx(sum(right) / 6)
    assert record["dtype"] == "float32"


class Searches(Drop):
    """Notes that it was asked for a plan."""

    def plan(self, model, calibration):
        raise AssertionError("the search began")


def test_a_missing_file_is_told_before_the_search(pico_dir, tmp_path):
    hook = ZeroShot(["piqa"], local_data=str(tmp_path))
    trainer = make_trainer(tmp_path / "run", Searches([1]), hook)
    with pytest.raises(UsageError, match=r"piqa/validation\.jsonl"):
        trainer.test(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    assert not (tmp_path / "run" / "results.json").exists()


def test_impossible_numbers_are_told_when_the_configuration_is_read():
    with pytest.raises(UsageError, match="num_fewshot -1"):
        ZeroShot(num_fewshot=-1)
    with pytest.raises(UsageError, match="limit 0"):
        ZeroShot(limit=0)


def test_a_task_file_is_known_by_all_that_it_is_made_of(tmp_path):
    folder, data = tmp_path / "tasks", tmp_path / "data.jsonl"
    folder.mkdir()
    files = {
        data: '{"text": "a"}',
        folder / "base.yaml": "doc_to_text: '{{text}}'\n",
        folder / "utils.py": "def shorten(doc):\n    return doc\n",
        folder / "mine.yaml": "task: mine\ninclude: base.yaml\nprocess_docs: !function utils.shorten\n"
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\n",
    }
    for path, text in files.items():
        path.write_text(text)
    before = task_content(str(folder / "mine.yaml"))
    assert task_content(str(folder / "mine.yaml")) == before
    changes = {
        "data.jsonl": ("a", "b"),
        "base.yaml": ("text", "body"),
        "utils.py": ("doc", "one"),
        "mine.yaml": ("json", "csv"),
    }
    for path, text in files.items():
        path.write_text(text.replace(*changes[path.name]))
        assert task_content(str(folder / "mine.yaml")) != before, path
        path.write_text(text)
    assert task_content(str(folder / "mine.yaml")) == before
