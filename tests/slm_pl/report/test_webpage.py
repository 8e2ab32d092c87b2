import base64
import dataclasses
import re
import subprocess
from html.parser import HTMLParser

import pytest

from slm_pl.report import compare
from slm_pl.report.comparison import line_up
from slm_pl.report.webpage import page
from tests.helpers.browser import browser
from tests.helpers.records import record_of, save

EVIL = "<script>document.title = 'owned'</script>\"'&"


class Reader(HTMLParser):
    """Cells of the table, line by line, and the tags of the page."""

    def __init__(self, text):
        super().__init__()
        self.lines, self.tags, self.attributes, self.in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.lines[-1][-1] += data


def _records():
    records = {"dense": record_of("dense")}
    for name, perplexity in (("a", 300.0), ("b", 9000.0), ("c", 40.0), ("d", 41.0)):
        records[name] = record_of(name, name, perplexity=perplexity)
    lacking = record_of("e", "e")
    lacking.perplexity, lacking.missing["perplexity"] = [], "no <text>"
    return {"lacking": lacking, **records}


def test_a_line_per_model_and_everything_inline(tmp_path):
    compare(save(tmp_path, **_records()))
    text = (tmp_path / "comparison.html").read_text()
    reader = Reader(text)
    heads, *lines = reader.lines
    assert [line[0] for line in lines] == ["dense", "e", "a", "b", "c", "d"]
    perplexity = next(index for index, head in enumerate(heads) if head.startswith("Perplexity"))
    assert [line[perplexity] for line in lines] == [
        "20.00 ± 0.50", "– [1]", "300.00 ± 0.5015.0×", "9,000 ± 0.50450×", "40.00 ± 0.502.00×", "41.00 ± 0.502.05×",
    ]  # fmt: skip
    assert '<strong class="best">40.00 ± 0.50</strong>' in text
    assert '<p id="note-1">[1] no &lt;text&gt;</p>' in text
    assert text.count("<button") == len(heads)
    assert [one["aria-sort"] for one in reader.attributes if one.get("scope") == "col"] == ["none"] * len(heads)
    # Nothing is fetched from anywhere.
    assert "link" not in reader.tags
    assert not [one for one in reader.attributes if re.match("https?:|//", one.get("src") or one.get("href") or "")]
    inline = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(one) for one in inline] == [
        (tmp_path / name).read_bytes() for name in ("pareto.png", "comparison.png", "comparison_efficiency.png")
    ]


def test_titles_tell_what_the_table_does_not(tmp_path):
    dense, pruned = record_of("dense"), record_of("pruned", "ab", accuracy=0.51)
    for record in (dense, pruned):
        record.perplexity[0] = dataclasses.replace(record.perplexity[0], word_value=70.0, words=2900)
        record.zero_shot.tasks["boolq"] = dataclasses.replace(record.zero_shot.tasks["boolq"], all={"acc_norm": 0.1})
    text = page(line_up(save(tmp_path, dense=dense, pruned=pruned)), {})
    shares = '<td data-value="0.51" title="0.51; standard error 0.02; n = 25; 85.0 % of the dense baseline&#x27;s">'
    assert shares + "51.0 ± 2.0 %<small>85.0 %</small>" in text  # the mean
    assert shares + "51.0 ± 2.0 %</td>" in text  # the task
    assert "Word perplexity embedded @ 128" in text
    assert text.count("Perplexity of a word compares models of different tokenizers only where") == 1
    assert "acc_norm" not in text


def test_labels_are_text(tmp_path):
    records = {"dense": record_of("dense"), "evil": record_of(EVIL, EVIL, threads=8)}
    records["evil"].missing["perplexity"], records["evil"].perplexity = EVIL, []
    text = page(line_up(save(tmp_path, **records)), {})
    reader = Reader(text)
    assert reader.tags.count("script") == 1
    assert reader.lines[2][0] == EVIL
    assert [one["data-label"] for one in reader.attributes if "data-label" in one] == ["dense", EVIL]
    assert "<script>document" not in text


_CLICKS = """
<script>
const order = () => Array.from(document.querySelectorAll("#figures tbody th")).map((head) => head.dataset.label).join();
const head = document.querySelector('th[data-name^="perplexity."]');
const seen = [];
for (let click = 0; click < 3; click++) {
  head.querySelector("button").click();
  seen.push(order() + " " + head.getAttribute("aria-sort"));
}
document.querySelector("thead th button").click();
seen.push(order() + " " + head.getAttribute("aria-sort"));
const box = document.querySelector(".scroll");
box.style.maxHeight = "150px";
box.style.width = "300px";
box.scrollTo(200, 100);
const corner = document.querySelector("thead th").getBoundingClientRect(), frame = box.getBoundingClientRect();
seen.push([corner.left - frame.left, corner.top - frame.top].map(Math.round).join());
const result = document.createElement("pre");
result.id = "seen";
result.textContent = seen.join("|");
document.body.append(result);
</script>
"""


def test_where_a_browser_has_to_be_its_absence_is_a_failure(monkeypatch):
    monkeypatch.setattr("tests.helpers.browser.CHROMIUM", None)
    monkeypatch.setenv("SLM_PL_NEEDS_BROWSER", "1")
    # Either is caught: a skip that nobody catches would skip this test too.
    outcomes = (pytest.fail.Exception, pytest.skip.Exception)
    with pytest.raises(outcomes, match="SLM_PL_NEEDS_BROWSER is 1, but neither chromium") as raised:
        browser()
    assert raised.type is pytest.fail.Exception
    monkeypatch.setenv("SLM_PL_NEEDS_BROWSER", "0")
    with pytest.raises(outcomes, match="neither chromium") as raised:
        browser()
    assert raised.type is pytest.skip.Exception


def test_a_click_sorts_and_the_next_reverses(tmp_path):
    program = browser()
    text = page(line_up(save(tmp_path, **_records())), {})
    (tmp_path / "clicked.html").write_text(text.replace("</body>", f"{_CLICKS}</body>"))
    done = subprocess.run(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=2000",
            f"--user-data-dir={tmp_path / 'browser'}",
            "--dump-dom",
            f"file://{tmp_path / 'clicked.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1].split("|")
    # Perplexities: dense 20, c 40, d 41, a 300, b 9000; e has none and stays last.
    assert seen == [
        "dense,c,d,a,b,e ascending",
        "b,a,d,c,dense,e descending",
        "dense,c,d,a,b,e ascending",
        "a,b,c,d,dense,e none",  # by the label
        "1,1",  # the corner stays in the frame, inside of its border, however the table is scrolled
    ]
