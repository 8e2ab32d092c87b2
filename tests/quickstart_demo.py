"""``make demo`` after ``make quickstart``, seen in a browser: ``python -m tests.quickstart_demo [PICTURE.png]``.

Starts it as its users do, has its three models complete a prompt one after the other, looks at every tab, and ends it
with Ctrl-C. With a file's name, it leaves the picture of the page there that the README shows.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.helpers.browser import asked_of, driven_browser, resize

T = TypeVar("T")
MODELS = ("dense", "pruned", "recovered")


def until(condition: Callable[[], T], seconds: float = 120) -> T:
    """What ``condition`` gives once that is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, condition
        time.sleep(0.1)
    return found


def look(address: str, picture: str | None) -> None:
    """Uses the page."""
    with tempfile.TemporaryDirectory() as directory:
        driver = driven_browser(Path(directory))
        try:
            driver.get(address)

            def find(selector: str) -> list:
                return [one for one in driver.find_elements("css selector", selector) if one.is_displayed()]

            until(lambda: find("#prompt textarea"))
            find("button.label-wrap")[0].click()  # the settings
            until(lambda: find("#in_turn input"))[0].click()
            find("button.label-wrap")[0].click()
            prompt = find("#prompt textarea")[0]
            prompt.clear()
            prompt.send_keys("Once upon a time there was a")
            find("#run")[0].click()
            states = [f"#status_{index} .status" for index in range(len(MODELS))]
            until(lambda: all("Done" in one.text for state in states for one in find(state)) and len(find(states[-1])))
            for index, state in enumerate(states):
                text = find(f"#completion_{index} textarea")[0].get_attribute("value")
                rate = float(re.search(r"Tokens/s\n([\d.]+)", find(state)[0].text)[1])
                print(f"{MODELS[index]}: {rate} tokens/s, {text[:60]!r}")
                assert len(text) > 20
                assert rate > 0
            if picture is not None:
                resize(driver, 1400, 900)
                driver.execute_script("document.activeElement.blur()")
                time.sleep(0.5)
                driver.save_screenshot(picture)
            for tab, shown in (("Compare", "table.figures"), ("Layers", "#layers_2 img")):
                next(one for one in find("button[role=tab]") if one.text == tab).click()
                until(lambda shown=shown: find(shown))
            until(lambda: "merged" in find("#layers_2")[0].text and "dense model" in find("#layers_0")[0].text)
            assert asked_of(driver) == {address.removeprefix("http://").strip("/")}
            assert driver.get_log("browser") == []
        finally:
            driver.quit()


def main() -> None:
    """Runs the script."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell's background jobs ignore, and what they start
    process = subprocess.Popen(
        ["make", "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watchdog = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"Open (http\S+)", line):
                break
        else:
            raise SystemExit("make demo ended before it showed anything")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        look(found[1], sys.argv[1] if len(sys.argv) > 1 else None)
    finally:
        watchdog.cancel()
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
