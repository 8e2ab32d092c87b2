"""The demo in a real browser, started as its users start it."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, DropLayers, MergeLayers, Method, Plan
from slm_pl.evaluation.generation import complete
from slm_pl.export import save_compressed
from slm_pl.pictures import matrix_names, similarity_matrix
from tests.helpers.browser import asked_of, driven_browser, resize
from tests.helpers.pico import pico_model
from tests.helpers.records import record_of, save
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[3]
LABEL = "<b>x</b>${document.title}{{value}}"
EVIL = "<img src=x onerror=document.title='owned'>${document.title='owned'}{{value}}"
MERGED_TRACE = ({"low": 3, "high": 4, "similarity": 0.9, "accepted": True},)


def _model():
    return pico_model(bos_token_id=0, eos_token_id=None, pad_token_id=2, max_position_embeddings=1100)


def _pruned():
    model = _model()
    method = Method(f"callbacks.{EVIL}", {"similarity": EVIL})
    plan = Plan(Base.of(model), method, None, (MergeLayers(3, 4), DropLayers((1,))), MERGED_TRACE, {"threshold": 0.8})
    surgery.apply(model, plan)
    return model, plan


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a dense model and of an export."""
    folder = tmp_path_factory.mktemp("models")
    _model().save_pretrained(folder / "dense")
    pico_tokenizer().save_pretrained(folder / "dense")
    model, plan = _pruned()
    heat = similarity_matrix([[1.0, 0.5], [0.5, 1.0]], ["0", "1"], [], "CKA")
    save_compressed(model, pico_tokenizer(), folder / "pruned", [plan], False, figures={matrix_names(1)[1]: heat})
    return folder


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """Address of a demo with three models, of which one is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    records = {"dense": record_of("dense"), "pruned": record_of(EVIL, "ab", perplexity=31.5)}
    results = save(tmp_path_factory.mktemp("results"), **records)
    shown = [f"dense={models / 'dense'}", f"{LABEL}={models / 'pruned'}", f"gone={models / 'gone'}"]
    process = subprocess.Popen(
        [sys.executable, "main.py", "demo", "--models", *shown, "--results", *results, "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A proxy that is the rule must not be asked for the server's own address.
        env={**os.environ, "OMP_NUM_THREADS": "1", "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": ""},
    )
    watchdog = threading.Timer(150, process.kill)
    watchdog.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("Open http"):
            break
    else:
        watchdog.cancel()
        pytest.fail("".join(said))
    watchdog.cancel()  # of the start alone
    assert f"Open http://127.0.0.1:{port}/" in said[-1]
    threading.Thread(target=process.stdout.read, daemon=True).start()
    yield f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(30) == 130
    finally:
        process.kill()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = driven_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


class Page:
    """The demo in one tab of the browser."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.until(lambda: self.find("#prompt textarea"))
        self.tab = driver.current_window_handle

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        (found,) = self.find(selector)
        return found

    def until(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.one("body").text
            time.sleep(0.05)
        return found

    def prompt(self, text):
        box = self.one("#prompt textarea")
        box.clear()
        box.send_keys(text)
        return box

    def text(self, column):
        return self.one(f"#completion_{column} textarea").get_attribute("value")

    def status(self, column):
        return self.one(f"#status_{column}").text

    def done(self, *columns):
        self.until(lambda: all("Done" in self.status(column) for column in columns))

    def new_tokens(self, number):
        if not self.find("#new_tokens input[type=number]"):
            self.find("button.label-wrap")[0].click()
        box = self.until(lambda: self.find("#new_tokens input[type=number]"))[0]
        box.clear()
        box.send_keys(str(number), "\t")

    def open(self, name):
        def tabs():
            return [tab for tab in self.find("button[role=tab]") if tab.text == name and tab.is_displayed()]

        self.until(tabs)[0].click()

    def wide(self):
        return self.driver.execute_script("return document.documentElement.scrollWidth")


@pytest.fixture
def page(driver, server):
    resize(driver, 1400)
    asked_of(driver)
    driver.get_log("browser")
    page = Page(driver, server)
    yield page
    assert asked_of(driver) == {server.removeprefix("http://").strip("/")}, "something else was asked for"
    assert driver.get_log("browser") == []
    assert driver.title == "slm_pl"


def test_both_columns_fill_and_the_third_says_why_not(page):
    from selenium.webdriver import ActionChains

    page.prompt("A decoder layer")
    ActionChains(page.driver).double_click(page.one("#run")).perform()
    page.done(0, 1)
    time.sleep(1)  # the other click's columns end too
    for column, model in enumerate((_model(), _pruned()[0])):
        assert page.text(column) == complete(model, pico_tokenizer(), "A decoder layer", 64)
        status = page.status(column)
        assert "64 tokens" in status
        rate = float(re.search(r"Tokens/s\n([\d.,]+)", status)[1].replace(",", ""))
        latency, unit = re.search(r"Latency\n([\d.,]+) (m?s)", status).groups()
        seconds = float(latency.replace(",", "")) / (1000 if unit == "ms" else 1)
        assert 64 / rate == pytest.approx(seconds, rel=0.05)
        assert re.search(r"First token after\n[\d.,]+ m?s\nLatency", status)
        assert re.search(r"KV cache\n0\.\d\d MiB", status)
    assert page.text(0) != page.text(1)
    assert "There is no directory" in page.status(2)
    body = page.one("body").text
    assert body.count(LABEL) >= 2
    assert "6 layers" in body
    assert "4 layers" in body
    assert re.search(r"the process with all models takes [\d,]+ MiB of main memory", body)


def test_other_names_than_its_own_and_uploads_are_refused(server):
    address = server.removeprefix("http://").strip("/")
    port = address.rpartition(":")[2]

    def asked(method, path, host):
        connection = http.client.HTTPConnection(address, timeout=20)
        connection.request(method, path, headers={"Host": host, "Origin": f"http://{host}"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    for host in (address, f"localhost:{port}", f"[::1]:{port}"):
        assert asked("GET", "/", host)[0] == 200
    for path in ("/", "/config", "/gradio_api/startup-events"):
        assert asked("GET", path, f"evil.example:{port}") == (400, b"Invalid host header")
    assert asked("POST", "/gradio_api/upload", address)[0] == 403


def test_an_empty_prompt_is_told_and_leaves_the_columns(page):
    page.prompt("  ")
    page.one("#run").click()
    page.until(lambda: "The prompt is empty" in page.one("#message").text)
    assert [page.text(column) for column in (0, 1)] == ["", ""]
    page.new_tokens(1000)
    page.prompt("token " * 120)
    page.one("#run").click()
    page.until(lambda: "holds 1,100" in page.status(0))
    assert not page.one("#message").is_displayed()
    # Pasted: nothing of it is cut on the way.
    paste = "arguments[0].value = 'x'.repeat(200001); arguments[0].dispatchEvent(new Event('input'))"
    page.driver.execute_script(paste, page.one("#prompt textarea"))
    page.one("#run").click()
    page.until(lambda: "The prompt has 200,001 characters" in page.one("#message").text)


def test_keys_alone_run_and_stop(page):
    keys = page.driver.switch_to
    page.new_tokens(1000)
    for _ in range(40):
        focused = keys.active_element
        if focused.tag_name == "textarea" and page.one("#prompt textarea") == focused:
            break
        focused.send_keys("\ue008\ue004")  # Shift + Tab
    else:
        pytest.fail("the prompt cannot be reached")
    focused.send_keys(" of layers", "\ue008\ue007")  # Shift + Enter
    page.until(lambda: all("Writing" in page.status(column) for column in (0, 1)))
    growing = page.text(0)
    page.until(lambda: len(page.text(0)) > len(growing))
    for _ in range(3):
        keys.active_element.send_keys("\ue004")
        if keys.active_element.get_attribute("id") == "stop":
            break
    assert keys.active_element.get_attribute("id") == "stop"
    keys.active_element.send_keys("\ue007")
    page.until(lambda: all("Stopped" in page.status(column) for column in (0, 1)))
    made = int(re.search(r"Stopped\n([\d,]+) token", page.status(0))[1].replace(",", ""))
    assert 0 < made < 1000
    page.new_tokens(3)
    page.one("#run").click()
    page.done(0, 1)


def test_two_people_have_their_own_text_and_wait_for_each_other(page, server):
    page.new_tokens(1000)
    page.prompt("def main")
    page.one("#run").click()
    page.until(lambda: "Writing" in page.status(0))
    page.driver.switch_to.new_window("tab")
    other = Page(page.driver, server)
    resize(page.driver, 1400)
    other.prompt("The calibration set")
    other.one("#run").click()
    other.until(lambda: "Waiting: 1 ahead" in other.status(0))
    assert other.text(0) == ""
    page.driver.switch_to.window(page.tab)
    page.one("#stop").click()
    page.until(lambda: "Stopped" in page.status(0))
    stopped = page.text(0)
    page.driver.switch_to.window(other.tab)
    other.done(0, 1)
    assert other.text(0) == complete(_model(), pico_tokenizer(), "The calibration set", 64)
    page.driver.close()
    page.driver.switch_to.window(page.tab)
    assert page.text(0) == stopped
    assert complete(_model(), pico_tokenizer(), "def main", 64).startswith(stopped[:20])


def test_tables_and_pictures(page):
    page.open("Compare")
    table = page.until(lambda: [t for t in page.find("table.figures") if t.is_displayed()])[0]
    assert "31.50" in table.text
    assert EVIL in table.text
    assert "20.00" in table.text
    page.open("Layers")
    page.until(lambda: "it is a dense model" in page.one("#layers_0").text)
    page.until(lambda: page.find("#layers_1 img"))
    assert LABEL in page.one("body").text
    shown = page.one("#layers_1").text
    assert re.search(r"3–4\s+merged into one \(keep_top; norms and biases: top\)", shown)
    assert re.search(r"1\s+removed", shown)
    assert EVIL in shown
    loaded = "return Array.from(arguments[0].querySelectorAll('img'), (one) => [one.alt, one.naturalWidth > 100])"
    page.until(lambda: all(drawn for _, drawn in page.driver.execute_script(loaded, page.one("#layers_1"))))
    pictures = [alt for alt, _ in page.driver.execute_script(loaded, page.one("#layers_1"))]
    assert pictures == ["What became of each layer", "What the search saw", "How alike the layers were before (CKA)"]
    page.until(lambda: "There is no directory" in page.one("#layers_2").text)


def test_a_narrow_window_scrolls_in_one_direction(page):
    resize(page.driver, 400)
    page.one("#run").click()
    page.done(0, 1)
    for tab in ("Complete", "Compare", "Layers"):
        page.open(tab)
        time.sleep(0.3)
        assert page.wide() <= 400


def test_a_wide_window_is_used(page):
    for tab, shown in (("Compare", ".figures"), ("Layers", "#layers_0")):
        page.open(tab)
        page.until(lambda shown=shown: page.find(shown) and page.one(shown).is_displayed())
        assert page.one(shown).size["width"] > 1000
