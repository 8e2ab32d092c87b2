"""Holds the rooms to their doors: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module may import those of its own and of lower levels. A later entry stands for the longer path.
LEVELS = {
    "slm_pl": 0,  # errors, files, console, memory
    "slm_pl.compression": 1,
    "slm_pl.loading": 1,
    "slm_pl.data": 2,
    "slm_pl.evaluation": 2,
    "slm_pl.export": 2,
    "slm_pl.recovery": 2,
    "slm_pl.sharding": 2,
    "slm_pl.pictures": 2,
    "slm_pl.width_pictures": 2,
    "slm_pl.layer_map": 2,
    "slm_pl.model_card": 2,
    "slm_pl.gguf_tokenizer": 2,
    "slm_pl.gguf_export": 2,
    "slm_pl.results": 3,
    "slm_pl.journal": 3,
    "slm_pl.report": 3,
    "slm_pl.estimate": 3,
    "slm_pl.module": 4,
    "slm_pl.trainer": 4,
    "slm_pl.lifeline": 0,
    "slm_pl.sweep": 4,
    "slm_pl.demo": 4,
    "slm_pl.trainer_cli": 5,
    "slm_pl.commands": 5,
    "slm_pl.cli": 5,
    "slm_pl.__main__": 5,
    "callbacks": 6,
}
FILES = sorted([*ROOT.glob("slm_pl/**/*.py"), *ROOT.glob("callbacks/**/*.py")])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def level_of(module: str) -> int:
    return LEVELS[max((prefix for prefix in LEVELS if f"{module}.".startswith(f"{prefix}.")), key=len)]


def imported(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return [m for m in modules if m.split(".")[0] in ("slm_pl", "callbacks", "tests")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    own = level_of(name_of(path))
    for module in imported(path):
        assert not module.startswith("tests"), module
        assert level_of(module) <= own, f"{name_of(path)} (level {own}) imports {module} (level {level_of(module)})"


def test_only_the_surgery_changes_layers_and_only_the_architecture_knows_paths():
    for path in FILES:
        if path.name in ("architecture.py", "surgery.py"):
            continue
        text = path.read_text()
        assert "set_decoder_layers" not in text, path
        for module_path in ("self_attn", "model.layers", "down_proj", "num_hidden_layers"):
            code = ast.unparse(strip_docstrings(ast.parse(text)))
            assert module_path not in code, f"{path}: {module_path}"


def strip_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_top_level_is_what_was_agreed():
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    expected = {"slm_pl", "callbacks", "configs", "tests", "main.py", "pyproject.toml", "README.md"}
    assert top - {"LICENSE", "Makefile", "constraints.txt", ".gitignore", ".ci", ".github"} <= expected
