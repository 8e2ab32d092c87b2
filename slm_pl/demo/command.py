"""``main.py demo``: options, and the server."""

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jsonargparse import ArgumentParser

from slm_pl.demo.markup import readable
from slm_pl.demo.runs import MOST_MODELS
from slm_pl.errors import UsageError
from slm_pl.loading import KINDS, DType

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HERE = ("localhost", "127.0.0.1", "::1")
_EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104  what a user may give, to be told what it means


def demo_parser() -> ArgumentParser:
    """Options of ``demo``."""
    parser = ArgumentParser(
        prog="main.py demo",
        description="Shows models side by side in the browser: what they write to the same prompt, with speed and "
        "memory; what was measured of them; and what was done to their layers. Needs gradio: pip install '.[demo]'.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="LABEL=MODEL",
        help=f"Up to {MOST_MODELS}, each {KINDS}. Without a label, a directory's name is it.",
    )
    parser.add_argument("--results", nargs="*", default=[], help="results.json files, for the table and the plot.")
    parser.add_argument(
        "--host",
        type=str,
        default="127.0.0.1",
        help="Address to listen on, and the only name beside localhost that a browser may call it by; 0.0.0.0 is "
        "everybody's, under any name.",
    )
    parser.add_argument("--port", type=int, default=7860, help="Port to listen on.")
    parser.add_argument("--dtype", type=DType, default="auto", help="Of the weights; auto is the checkpoint's.")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, …; auto takes a GPU where there is one.")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run Python code that a checkpoint brings along."
    )
    return parser


def run_demo(args: Sequence[str]) -> None:
    """Runs ``demo`` until it is interrupted.

    Raises:
        UsageError: If gradio is missing, the address is taken, or no model can be loaded.
    """
    options = demo_parser().parse_args(args)
    named = label_models(options.models)
    _require_gradio()
    _check_address(options.host, options.port)
    device = _device(options.device)
    from slm_pl.demo.engine import Absent, load
    from slm_pl.report.comparison import line_up

    comparison = line_up(options.results) if options.results else None
    models = []
    for label, pretrained in named.items():
        print(f"Loading {label}: {pretrained}", flush=True)
        models.append(load(label, pretrained, options.trust_remote_code, options.dtype, device))
    absent = [one for one in models if isinstance(one, Absent)]
    for one in absent:
        print(f"{one.label} is not there: {one.reason}", flush=True)
    if len(absent) == len(models):
        raise UsageError(f"demo could load none of its models. {absent[0].label}: {absent[0].reason}")
    from slm_pl.demo import page

    blocks = page.build(models, comparison)
    _without_proxy(options.host)
    try:
        blocks.launch(
            server_name=_address(options.host),
            server_port=options.port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            max_threads=page.MOST_THREADS,
            theme=page.theme(),
            css=page.CSS,
            app_kwargs={"middleware": middleware(options.host)},
        )
        # Gradio's own message would come with a note on sharing.
        print(f"Open {blocks.local_url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except OSError as error:
        raise _taken(options.host, options.port, error) from error
    finally:
        with contextlib.redirect_stdout(None):
            blocks.close(verbose=False)


def label_models(given: Sequence[str]) -> dict[str, str]:
    """What ``--models`` names: the models by their labels.

    Args:
        given: ``label=model``, or a model, whose label is its last part that says something.

    Raises:
        UsageError: If there are too many, or two have one label.
    """
    if len(given) > MOST_MODELS:
        raise UsageError(f"demo got {len(given)} models; it shows up to {MOST_MODELS} side by side. Leave some out.")
    found: dict[str, str] = {}
    for one in given:
        label, separator, model = one.partition("=")
        label = readable(label)
        # A path may hold the sign itself.
        if not separator or os.path.exists(one):
            path = Path(one)
            label, model = readable((path.parent.name if path.name == "export" else path.name) or one), one
        if not label.strip() or not model:
            raise UsageError(
                f"--models got {one!r}; give LABEL=MODEL, for example pruned=runs/quickstart/pruned/export."
            )
        if label in found:
            raise UsageError(f"Two models are called {label!r}. Give each a label: --models first=… second=….")
        found[label] = model
    return found


def _require_gradio() -> None:
    """Imports gradio, with everything off that would tell others about it.

    Raises:
        UsageError: If it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"demo needs gradio, which cannot be imported ({error}). Install it: "
            "pip install -c constraints.txt '.[demo]'"
        ) from error


def _check_address(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on, before minutes of loading."""
    if not 1 <= port <= 65535:
        raise UsageError(f"--port is {port}; give one from 1 to 65535, and above 1023 without being root.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _taken(host, port, error) from error


def _taken(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(
        f"demo cannot listen on {host}, port {port}: {error.strerror or error}. Another program may use the port: give "
        "another --port; --host is an address of this computer, such as 127.0.0.1."
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        # What torch was built for need not be in this machine.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {name} cannot be used: {reason}. Give auto, cpu or cuda.") from error
    return device


_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; "
    b"form-action 'self'; base-uri 'self'"
)
"""Should an escape ever be forgotten: the page loads nothing from elsewhere, and no other page frames it.

It is no second wall: Gradio's own scripts stand in the page, so a stranger's would run too, and could go elsewhere.
"""


class _Guard:
    """Adds the policy to every answer, and takes no files: the page has no use for any."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.responses import PlainTextResponse

        async def guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", _POLICY), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        refused = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload")
        app = PlainTextResponse("Nothing is uploaded here.", status_code=403) if refused else self._app
        await app(scope, receive, guarded)


def middleware(host: str) -> list[object]:
    """What stands before the page.

    A browser is answered only if it calls this server by a name that is known to be its own: any other may be that of a
    page elsewhere, whose owner made the name point here to read along.

    Args:
        host: What it listens on. If that is every address of the computer, any name may be right.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = ["*"] if host in _EVERY_ADDRESS else [_address(name) for name in (*_HERE, host)]
    return [Middleware(_Guard), Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)]


def _address(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host


def _without_proxy(host: str) -> None:
    """Lets Gradio, which asks its own server whether it is there, do so directly, also where a proxy is the rule."""
    before = [os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    names = dict.fromkeys(one.strip() for text in before for one in text.split(","))
    told = ",".join(name for name in (*names, *_HERE, host) if name)
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = told
