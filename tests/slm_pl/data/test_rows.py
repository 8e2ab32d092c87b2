import json

import pyarrow
import pyarrow.parquet
import pytest

from slm_pl import files
from slm_pl.data.readers import read_column, read_json_list, read_jsonl
from slm_pl.data.rows import read_rows, rows_on_disk
from slm_pl.errors import UsageError

ROWS = [
    {"instruction": f"Say {number} \u2028 é", "input": "" if number % 2 else "x\r\ny", "output": f"{number}\n"}
    for number in range(2345)
]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_table_holds_the_rows_of_its_source_and_leaves_nothing(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("SLM_PL_CACHE", str(tmp_path / "cache"))
    source = write(tmp_path / f"a{suffix}", ROWS)
    with rows_on_disk(source) as table:
        assert list(table) == ROWS
        assert [file.name.startswith(".rows.arrow.") for file in (tmp_path / "cache").iterdir()] == [True]
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_are_read_before_the_file_is_at_its_end(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, ROWS)
    with path.open("a") as file:
        file.write('{"instruction": ')
    rows = read_rows(str(path))
    assert [next(rows) for _ in range(2000)] == ROWS[:2000]
    with pytest.raises(UsageError, match=r"a\.jsonl?, line \d+.*: not valid JSON"):
        list(rows)


@pytest.mark.parametrize(
    "text",
    ["[]", " [1, 2.5, 1e400]", '[{"a": NaN}, -Infinity, 1]', '[{"item": [1]}]', f"{' ' * 5000}[3]", "[0, [], {}]"],
)
def test_a_list_is_what_pythons_reader_takes_it_for(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert repr(list(read_json_list(path))) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"item": [{"instruction": "a", "output": "b"}]}', "a JSON dict; allowed is a list"),
        ("3", "a JSON int; allowed is a list"),
        ("", r"line 1, column 1: not valid JSON"),
        ("[1,\n2", r"line 2, column 2: not valid JSON"),
        ("[1] 2", r"line 1, column 5: not valid JSON"),
        ('["\udcff"]', "cannot be read as UTF-8"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(UsageError, match=message):
        list(read_json_list(path))


def test_lines_end_as_in_text_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "\u2028"}\r\n\r\n{"a": 2}\r{"a": 3}'.encode())
    assert [(place.rpartition(" ")[2], row["a"]) for place, row in read_jsonl(path)] == [
        ("1", "\u2028"),
        ("3", 2),
        ("4", 3),
    ]


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    with open(path, "a") as file:
        file.write('\n{"instruction": "\\ud800", "output": ""}')
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: the text in column 'instruction' is no Unicode"):
        list(read_rows(path))


def test_text_in_a_parquet_file_that_is_no_utf_8_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    offsets = pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0")
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff\xfe\xfda")])
    pyarrow.parquet.write_table(pyarrow.table({"instruction": bad, "output": bad}), path)
    with pytest.raises(UsageError, match=r"a\.parquet cannot be read as a parquet file: 'utf-8' codec can't decode"):
        list(read_rows(str(path)))
    texts = read_column(str(path), None, "train", "output")
    for read in (lambda: texts[0], lambda: list(texts)):
        with pytest.raises(UsageError, match=r"a\.parquet: column 'output' holds text that is no UTF-8"):
            read()


def test_a_scratch_file_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "a"
    monkeypatch.setattr(files.os, "getpid", lambda: 2**22 + 1)  # no process has this number
    with files.scratch(path) as left:
        kept = left.read_bytes()
        left.rename(left.with_name(f"{left.name}x"))
    monkeypatch.undo()
    assert [file.name[:3] for file in tmp_path.iterdir()] == [".a."]
    with files.scratch(path) as other:
        assert list(tmp_path.iterdir()) == [other]
    assert kept == b""
    assert list(tmp_path.iterdir()) == []
