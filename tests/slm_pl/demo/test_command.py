import builtins
import socket
import urllib.request

import pytest
import torch

from slm_pl.cli import main
from slm_pl.demo.command import _device, _without_proxy, label_models, middleware
from slm_pl.errors import UsageError


def test_models_have_labels(tmp_path, monkeypatch):
    assert label_models(["dense=a/b", "runs/quickstart/pruned/export", "org/name", "x=package:p/m=1.gguf"]) == {
        "dense": "a/b",
        "pruned": "runs/quickstart/pruned/export",
        "name": "org/name",
        "x": "package:p/m=1.gguf",
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert label_models(["lr=1"]) == {"lr=1": "lr=1"}
    assert list(label_models(["a\udcff=x"])) == ["a?"]  # an argument that is no UTF-8


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a=x", "a=y"], "Two models are called 'a'"),
        (["=x"], "give LABEL=MODEL"),
        (["a="], "give LABEL=MODEL"),
        (list("abcde"), "got 5 models; it shows up to 4"),
    ],
)
def test_labels_that_are_none(given, told):
    with pytest.raises(UsageError, match=told):
        label_models(given)


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1", {"127.0.0.1:7860", "localhost", "[::1]:7860"}),
        ("box.lan", {"127.0.0.1:7860", "localhost", "[::1]:7860", "box.lan:7860"}),
        ("0.0.0.0", {"127.0.0.1:7860", "localhost", "[::1]:7860", "box.lan:7860", "evil.example"}),
        ("::", {"127.0.0.1:7860", "localhost", "[::1]:7860", "box.lan:7860", "evil.example"}),
    ],
)
def test_who_calls_the_page_by_another_name_is_not_answered(host, answered):
    pytest.importorskip("gradio")
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    routes = [Route(path, lambda request: PlainTextResponse("x"), methods=["GET", "POST"]) for path in ("/", "/upload")]
    client = TestClient(Starlette(routes=routes, middleware=middleware(host)))
    names = ("127.0.0.1:7860", "localhost", "[::1]:7860", "box.lan:7860", "evil.example")
    answers = {name: client.get("/", headers={"Host": name}) for name in names}
    assert {name for name, answer in answers.items() if answer.status_code == 200} == answered
    assert all("default-src 'self'" in answer.headers["content-security-policy"] for answer in answers.values())
    assert client.post("/upload", headers={"Host": "localhost"}).status_code == 403


def test_what_torch_was_built_for_need_not_be_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert _device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert _device("auto") == torch.device("cuda")


def test_a_proxy_is_not_asked_for_the_demos_own_address(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org, example.net")
    monkeypatch.setenv("no_proxy", "example.net")
    _without_proxy("box.lan")
    hosts = ("example.org", "example.net", "127.0.0.1", "localhost", "::1", "box.lan")
    assert [bool(urllib.request.proxy_bypass(host)) for host in (*hosts, "example.com")] == [True] * 6 + [False]


def _fails(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["demo", *args])
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_a_busy_port_is_told_before_anything_is_loaded(capsys, monkeypatch):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = _fails(capsys, "--models", "no/such/model/at/all", "--port", str(port))
    assert f"error: demo cannot listen on 127.0.0.1, port {port}: Address already in use" in told
    assert "--port" in told
    assert "cannot listen on 192.0.2.1" in _fails(capsys, "--models", "x", "--host", "192.0.2.1")
    assert "--port is 0" in _fails(capsys, "--models", "x", "--port", "0")


def test_without_gradio_the_extra_is_named(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    told = _fails(capsys, "--models", "x")
    assert told.startswith("error: demo needs gradio")
    assert "'.[demo]'" in told


def test_no_model_at_all_is_an_error(capsys, tmp_path):
    pytest.importorskip("gradio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = _fails(capsys, "--models", f"gone={tmp_path}/gone", "--port", str(port))
    assert "demo could load none of its models. gone: There is no directory" in told
    assert "there is no device" not in told
    assert "--device nonsense cannot be used" in _fails(
        capsys, "--models", "x", "--port", str(port), "--device", "nonsense"
    )
