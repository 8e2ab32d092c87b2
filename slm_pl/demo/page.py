"""The demo's page: Gradio's components around :mod:`slm_pl.demo.engine`."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import gradio as gr
import torch

from slm_pl.demo import sights
from slm_pl.demo.engine import Absent, DemoModel, Event, Failed, Finished, Waiting, Writing, failure, process_memory
from slm_pl.demo.markup import escape, readable
from slm_pl.demo.runs import MOST_AT_ONCE, MOST_NEW_TOKENS, Runs, Settings
from slm_pl.errors import UsageError
from slm_pl.report.comparison import Comparison

if TYPE_CHECKING:
    from gradio.themes import Base

Shown = tuple[object, object]
"""Text and status of a column: a text, HTML, or that it stays."""

CSS = """
.gradio-container { width: 100%; max-width: 1400px !important; margin: 0 auto !important; }
.intro h1 { font-size: 1.5rem; font-weight: 650; margin: 0; }
.intro p, .sight .soft, .notes p { color: var(--body-text-color-subdued); font-size: 0.87rem; margin: 0.25rem 0; }
.facts { color: var(--body-text-color-subdued); font-size: 0.87rem; padding: 0 0.15rem; min-height: 2.8rem; }
.facts strong { color: var(--body-text-color); font-size: 1.05rem; display: block; overflow-wrap: anywhere; }
.status { padding: 0 0.15rem; min-height: 4.6rem; font-size: 0.87rem; overflow-wrap: anywhere; }
.status dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); gap: 0.35rem 0.9rem;
  margin: 0; }
.status dt { color: var(--body-text-color-subdued); font-size: 0.75rem; }
.status dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.status .failed, .message p, .sight .warning { background: var(--error-background-fill, #fff1f0);
  border-left: 4px solid #d64545; border-radius: 4px; padding: 0.45rem 0.75rem; margin: 0; overflow-wrap: anywhere; }
.message:not(:has(p)) { display: none; }
.buttons { justify-content: flex-start; }
.buttons button { flex: 0 1 9rem; }
.completion textarea { font-size: 0.95rem; line-height: 1.5; }
.model .label-wrap span { overflow-wrap: anywhere; text-align: left; }
.sight { contain: inline-size; }  /* a wide table scrolls, it does not widen the page */
.sight table { border: 0 !important; }
.sight h3 { font-size: 1.05rem; font-weight: 650; margin: 1rem 0 0.25rem; }
.sight p { margin: 0.3rem 0; overflow-wrap: anywhere; }
.sight .scroll { overflow-x: auto; margin: 0.6rem 0; border: 1px solid var(--border-color-primary);
  border-radius: 8px; }
.sight table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums;
  margin: 0; }
.sight th, .sight td { padding: 0.4rem 0.75rem; text-align: left; }
.sight tr > *, .sight thead, .sight tbody, .sight tr { border: 0 !important; }
.sight tbody tr > * { border-top: 1px solid var(--border-color-primary) !important; }
.sight .figures th:not(:first-child), .sight .figures td { text-align: right; white-space: nowrap; }
.sight thead th { background: var(--background-fill-secondary); }
.sight tbody th { font-weight: 500; min-width: 8rem; }
.sight figure { margin: 1rem 0; }
.sight img { display: block; max-width: 100%; height: auto; background: #fff; padding: 0.5rem; border-radius: 8px;
  border: 1px solid var(--border-color-primary); }
.sight figcaption { color: var(--body-text-color-subdued); font-size: 0.87rem; margin-top: 0.3rem; }
"""
_EXAMPLE = "The capital of France is"
MOST_THREADS = 2 * MOST_AT_ONCE + 40
"""One for each that is served or waits, in the models' lines and in that of those who work in turn, and some for what
is quick: without a thread, Run would not even be told that a model is busy."""


def build(models: "Sequence[DemoModel | Absent]", comparison: Comparison | None) -> gr.Blocks:
    """Lays the page out.

    Args:
        models: A column each.
        comparison: The figures of results.json files; None if none were given.
    """
    runs = Runs()
    device = next((one.device for one in models if isinstance(one, DemoModel)), torch.device("cpu"))
    with gr.Blocks(title="slm_pl", analytics_enabled=False) as page:
        gr.HTML(f'<div class="intro"><h1>slm_pl</h1><p>{escape(", ".join(one.label for one in models))}</p></div>')
        with gr.Tab("Complete"):
            prompt = gr.Textbox(
                _EXAMPLE,
                label="Prompt",
                info="Shift + Enter runs",
                placeholder="Some text for the models to continue",
                lines=2,
                max_lines=8,
                elem_id="prompt",
            )
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Run", variant="primary", elem_id="run", min_width=120)
                halt = gr.Button("Stop", elem_id="stop", min_width=120)
            message = gr.HTML(elem_id="message", elem_classes="message")
            with gr.Accordion("Settings", open=False), gr.Row():
                new_tokens = gr.Slider(
                    1, MOST_NEW_TOKENS, 64, step=1, label="New tokens", info="at most", elem_id="new_tokens"
                )
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="of the draws, above temperature 0")
                in_turn = gr.Checkbox(
                    label="One model at a time",
                    info="speeds that compare, unless somebody else runs all at once",
                    elem_id="in_turn",
                )
            columns: list[tuple[gr.Textbox, gr.HTML]] = []
            with gr.Row():
                for index, one in enumerate(models):
                    with gr.Column(min_width=280):
                        gr.HTML(_facts(one))
                        text = gr.Textbox(
                            label=f"Completion by {readable(one.label)}",
                            show_label=False,
                            lines=9,
                            max_lines=9,
                            interactive=False,
                            buttons=["copy"],
                            elem_id=f"completion_{index}",
                            elem_classes="completion",
                        )
                        columns.append((text, gr.HTML(_status(""), elem_id=f"status_{index}")))
            memory = gr.HTML(_notes(device), elem_id="notes")
        with gr.Tab("Compare"):
            gr.HTML(
                '<div class="sight"><p>No figures were given. Measure with <code>main.py test</code>, and start with '
                "<code>--results runs/quickstart/*/results.json</code>.</p></div>"
                if comparison is None
                else sights.comparison_html(comparison)
            )
        with gr.Tab("Layers") as layers:
            shown = []
            for index, one in enumerate(models):
                # Not tabs: a row of long labels would be wider than a narrow window.
                with gr.Accordion(readable(one.label), elem_classes="model"):
                    shown.append(gr.HTML('<div class="sight"><p>Drawing …</p></div>', elem_id=f"layers_{index}"))

        number = gr.State(0)
        begun = gr.on(
            [start.click, prompt.submit],
            _beginner(runs),
            [prompt, new_tokens, temperature, seed, in_turn],
            [number, message],
            show_progress="hidden",
            trigger_mode="multiple",
            concurrency_limit=None,
            api_visibility="private",
        )
        for index, (one, column) in enumerate(zip(models, columns, strict=True)):
            # As many as come, up to MOST_THREADS: the models' own lines let one request through at a time, say how many
            # are ahead, and refuse more than they hold.
            written = begun.then(
                _writer(runs, one, index),
                number,
                list(column),
                show_progress="hidden",
                trigger_mode="multiple",
                concurrency_limit=None,
                api_visibility="private",
            )
            written.then(
                lambda: _notes(device), None, memory, show_progress="hidden", queue=False, api_visibility="private"
            )

        def stop(request: gr.Request) -> None:
            runs.stop(str(request.session_hash))

        def leave(request: gr.Request) -> None:
            runs.leave(str(request.session_hash))

        halt.click(stop, None, None, queue=False, show_progress="hidden", api_visibility="private")
        page.unload(leave)
        layers.select(_painter(models), None, shown, show_progress="hidden", api_visibility="private")
    return page


def theme() -> "Base":
    """Gradio's plainest theme, in the system's own fonts: nothing is fetched."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
    mono = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace")
    plain = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=mono)
    # Small print that can be read: its own grey has a contrast of 2.6 to white.
    return plain.set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
    )


def _beginner(runs: Runs) -> Callable[..., tuple[int, str]]:
    def begin(
        prompt: str, new_tokens: float, temperature: float, seed: float, in_turn: bool, request: gr.Request
    ) -> tuple[int, str]:
        settings = Settings(int(new_tokens or 0), float(temperature or 0), int(seed or 0), bool(in_turn))
        try:
            run = runs.begin(str(request.session_hash), prompt or "", settings)
        except UsageError as error:
            return 0, f'<p role="alert">{escape(str(error))}</p>'
        return run.number, ""

    return begin


def _writer(runs: Runs, model: "DemoModel | Absent", column: int) -> Callable[..., Iterator[Shown]]:
    def write(number: int, request: gr.Request) -> Iterator[Shown]:
        # Gradio empties the column of who says nothing at all, also where another click fills it.
        yield gr.skip(), gr.skip()
        with runs.claim(str(request.session_hash), number, column) as run:
            if run is None:
                return  # nothing was begun, something else was meanwhile, or another click does it
            for event in model.complete(run):
                yield show(event)

    return write


def _painter(models: "Sequence[DemoModel | Absent]") -> Callable[[], list[str]]:
    """Draws what was done to all models when it is first looked at."""
    drawn: list[str] = []
    lock = threading.Lock()  # matplotlib's settings are the process's

    def paint() -> list[str]:
        with lock:
            if not drawn:
                drawn[:] = [_layers(one) for one in models]
        return drawn

    return paint


def _layers(model: "DemoModel | Absent") -> str:
    if isinstance(model, Absent):
        return sights.warning_html(model.reason)
    try:
        return sights.layers_html(model.label, model.directory, model.parameters)
    except Exception as error:  # noqa: BLE001 - whatever a plan ends in, the other models are shown
        return sights.warning_html(f"The layers of {model.label} cannot be shown: {failure(error)}")


def show(event: Event) -> Shown:
    """What a column shows of an event."""
    if isinstance(event, Waiting):
        return "", _status(f"Waiting: {event.ahead} ahead")
    if isinstance(event, Failed):
        return gr.skip(), f'<div class="status" role="status"><p class="failed">{escape(event.reason)}</p></div>'
    return event.text, _figures(event)


def _figures(event: Writing) -> str:
    state = "Writing"
    if isinstance(event, Finished):
        state = "Stopped" if event.stopped else "Done"
    rate = event.tokens_per_s
    figures = {
        state: f"{event.tokens:,} token{'s' * (event.tokens != 1)}",
        "Tokens/s": "–" if rate is None else f"{rate:,.1f}",
        "First token after": "–" if event.first_s is None else _seconds(event.first_s),
        "Latency": _seconds(event.seconds),
    }
    if isinstance(event, Finished) and event.cache_bytes is not None:
        figures["KV cache"] = f"{event.cache_bytes / 2**20:,.2f} MiB"
    parts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    # A reader of the screen is told the end, not every token.
    live = ' role="status"' if isinstance(event, Finished) else ""
    return f'<div class="status" data-state="{state.lower()}"{live}><dl>{parts}</dl></div>'


def _seconds(value: float) -> str:
    return f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.2f} s"


def _status(text: str) -> str:
    return f'<div class="status">{escape(text)}</div>'


def _facts(model: "DemoModel | Absent") -> str:
    if isinstance(model, Absent):
        return f'<div class="facts"><strong>{escape(model.label)}</strong>not loaded</div>'
    size = f"{model.parameters / 1e6:,.1f} M parameters, {model.num_layers} layers"
    weights = f"{model.weight_bytes / 2**20:,.0f} MiB of {escape(model.dtype)}"
    return f'<div class="facts"><strong>{escape(model.label)}</strong>{size}, {weights}</div>'


def _notes(device: torch.device) -> str:
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    text = (
        f"All models share one process and {where}: what runs at the same time slows the others down, so figures that "
        "compare are those of the next tab, or of one model at a time. Weights are counted, the KV cache is computed; "
        f"the process with all models takes {process_memory(device)} now."
    )
    return f'<div class="notes"><p>{escape(text)}</p></div>'
