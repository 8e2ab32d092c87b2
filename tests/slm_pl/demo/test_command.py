import builtins
import socket

import pytest

from slm_pl.cli import main
from slm_pl.demo.command import label_models
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
