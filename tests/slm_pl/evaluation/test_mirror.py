import hashlib
import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from slm_pl.cli import main
from slm_pl.errors import UsageError
from slm_pl.evaluation import zero_shot
from slm_pl.evaluation.mirror import MANIFEST, make_mirror
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.evaluation.pico import pico_llama

ROWS = [
    {"goal": f"Öffne “{place}”\nnow", "sol1": "turn it", "sol2": "turn the table", "label": place % 2}
    for place in range(6)
]


@pytest.fixture
def hub(tmp_path):
    """A data set in the form of the hub's (parquet, a README with splits), and a task that reads it."""
    features = Features(
        {"goal": Value("string"), "sol1": Value("string"), "sol2": Value("string"), "label": ClassLabel(2)}
    )
    rows = {"train": ROWS[::-1], "validation": ROWS, "extra": ROWS}
    repository = tmp_path / "hub"
    repository.mkdir()
    for split, part in DatasetDict({k: Dataset.from_list(v, features) for k, v in rows.items()}).items():
        part.to_parquet(repository / f"{split}.parquet")
    files = "".join(f"  - {{split: {split}, path: {split}.parquet}}\n" for split in rows)
    (repository / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    task = tmp_path / "household.yaml"
    task.write_text(
        f"""task: household
dataset_path: {repository}
dataset_name: main
output_type: multiple_choice
training_split: train
validation_split: validation
doc_to_text: "{{{{goal}}}}:"
doc_to_choice: "{{{{[sol1, sol2]}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return task


def test_a_mirror_asks_what_its_source_asks(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    direct = zero_shot(pico_llama(), pico_tokenizer(), [str(hub)], num_fewshot=1)
    output = tmp_path / "mirror"
    main(["data", "--tasks", str(hub), "--output", str(output)])

    assert sorted(path.name for path in output.iterdir()) == [MANIFEST, "household"]
    # The split that the task does not use is not fetched.
    assert sorted(path.name for path in (output / "household").iterdir()) == ["train.jsonl", "validation.jsonl"]
    content = (output / "household" / "validation.jsonl").read_bytes()
    assert [json.loads(line) for line in content.splitlines()] == ROWS
    manifest = json.loads((output / MANIFEST).read_text())
    assert [one["path"] for one in manifest] == ["household/train.jsonl", "household/validation.jsonl"]
    assert manifest[1]["sha256"] == hashlib.sha256(content).hexdigest()
    assert (manifest[1]["rows"], manifest[1]["split"]) == (6, "validation")
    assert manifest[1]["source"] == f"{hub.parent}/hub/main"

    mirrored = zero_shot(pico_llama(), pico_tokenizer(), [str(hub)], local_data=str(output), num_fewshot=1)
    one, other = direct.tasks["household"], mirrored.tasks["household"]
    assert (one.requests_sha256, one.all) == (other.requests_sha256, other.all)
    assert (one.data, other.data) == (manifest[1]["source"], "local")


def test_what_is_there_stays_and_a_failure_stops_nothing(hub, tmp_path, capsys):
    output = tmp_path / "mirror"
    first = make_mirror(output, [str(hub)])
    assert [one.path for one in first.written] == ["household/train.jsonl", "household/validation.jsonl"]
    mine = output / "household" / "validation.jsonl"
    mine.write_text("mine")
    second = make_mirror(output, [str(hub)])
    assert (second.written, second.there, second.failed) == ([], ["household"], {})
    assert mine.read_text() == "mine"
    # What lacks is fetched, and what is there stays.
    (output / "household" / "train.jsonl").unlink()
    assert [one.path for one in make_mirror(output, [str(hub)]).written] == ["household/train.jsonl"]
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in output.iterdir()) == [MANIFEST, "household"]

    broken = tmp_path / "broken.yaml"
    broken.write_text(hub.read_text().replace("household", "broken").replace("split: train", "split: absent"))
    with pytest.raises(SystemExit) as exit:
        main(["data", "--tasks", str(broken), str(hub), "--output", str(output), "--overwrite"])
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert "broken" in error
    assert "absent" in error
    assert not list(output.glob("*broken*/*"))
    assert len(mine.read_text().splitlines()) == len(ROWS)
    assert [one["path"] for one in json.loads((output / MANIFEST).read_text())] == [one.path for one in first.written]


def test_unknown_names_and_tasks_without_data(tmp_path):
    with pytest.raises(UsageError, match="no text named wikitext3.*wikitext2"):
        make_mirror(tmp_path, texts=["wikitext3"])
    with pytest.raises(UsageError, match="unknown task 'helaswag'"):
        make_mirror(tmp_path, ["helaswag"])
