"""Loads exports in a fresh virtual environment that holds only torch and transformers, and compares logits.

    python -m tests.stock_export runs/quickstart/pruned/export

The reference is the model in memory: the dense model of the first plan, with the plans applied to it here. An export
whose layers differ in width is loaded with the code that it brings.
"""

import argparse
import subprocess
import tempfile
import venv
from pathlib import Path

import torch
from safetensors.torch import save_file

from slm_pl.compression import surgery
from slm_pl.compression.plan import load_plans
from slm_pl.console import brings_code
from slm_pl.loading import load_model, resolve

STOCK = """
import importlib.util, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in ("slm_pl", "callbacks", "peft", "lightning"):
    assert importlib.util.find_spec(name) is None, name
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[3] == "own")
AutoTokenizer.from_pretrained(sys.argv[1])("A tokenizer comes along.")
reference = load_file(sys.argv[2])
with torch.inference_mode():
    logits = model(input_ids=reference["ids"]).logits
    model.generate(reference["ids"][:1, :8], max_new_tokens=4, do_sample=False, use_cache=True)
print("largest difference of the logits:", (logits - reference["logits"]).abs().max().item())
assert torch.equal(logits, reference["logits"])
"""


def main() -> None:
    """Makes the environment, runs the comparison in it, and fails if a logit differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exports", type=Path, nargs="+")
    exports = [export.resolve() for export in parser.parse_args().exports]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(f"{folder}/venv", with_pip=True)
        python = f"{folder}/venv/bin/python"
        constraints = Path(__file__).resolve().parents[1] / "constraints.txt"
        pip = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints)]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, "transformers"], check=True)
        for export in exports:
            plans = load_plans(export)
            model = load_model(resolve(plans[0].base.pretrained), "float32")
            for plan in plans:
                surgery.apply(model, plan)
            ids = torch.randint(0, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
            with torch.inference_mode():
                logits = model(input_ids=ids).logits
            save_file({"ids": ids, "logits": logits}, f"{folder}/reference.safetensors")
            own = "own" if brings_code(str(export)) else "stock"
            print(f"{export.parent.name}: {len(plans)} plans, {own} code", flush=True)
            command = [python, "-I", "-c", STOCK, str(export), f"{folder}/reference.safetensors", own]
            subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    main()
