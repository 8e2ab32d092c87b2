"""Memory that recovering Llama-2-13B takes on each GPU: ``python -m tests.benchmarks.training_memory``.

Nothing is run and nothing is guessed: the model is built without weights from Llama-2-13B's public sizes and wrapped by
PEFT, its parameters are counted, and the formulas of :func:`training_memory` say what each strategy keeps of them.
``tests/slm_pl/test_training_memory.py`` holds the formulas against bytes that a small model really takes.

Batch size, cutoff, adapters and number of GPUs are those of ``configs/llama2_13b_slm.yaml``. Left out are the CUDA
context and NCCL (about 1 GB), what the allocator loses to fragments, and the temporaries of the optimizer step.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from slm_pl import parts
from slm_pl.recovery.memory import GB, REDUCE_BUCKET, Sizes, Strategy, training_memory

CONFIG = Path(__file__).parents[2] / "configs" / "llama2_13b_slm.yaml"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama2_13b(layers: int, rank: int) -> Sizes:
    """Llama-2-13B with some of its 40 layers and LoRA on all projections."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=layers,
        num_attention_heads=40,
        num_key_value_heads=40,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    return Sizes.of(adapted, config, rank)


def table(sizes: Sizes, gpus: int, tokens: int, response_tokens: int, capacity: float) -> str:
    """A Markdown table with one line for each strategy, in GB of 10^9 bytes."""
    head = ["strategy", "weights", "adapters", "gradients", "AdamW", "fp32 copies", "buffers", "layer inputs"]
    head += ["layer or head", "**peak**", "of a GPU", "host, all GPUs"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for strategy in get_args(Strategy)[1:]:
        memory = training_memory(sizes, strategy, gpus, tokens, response_tokens)
        cells = [memory.weights, memory.adapters, memory.gradients, memory.optimizer, memory.master, memory.buffers]
        cells += [memory.layer_inputs, max(memory.layer_peak, memory.head_peak)]
        line = [strategy.replace("_", " "), *(f"{cell / GB:.2f}" for cell in cells), f"**{memory.total / GB:.2f}**"]
        lines.append([*line, f"{memory.total / capacity:.0%}", f"{memory.host * gpus / GB:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; exit code 1 if the strategy of the shipped config does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.training_memory",
        description="Memory per GPU of recovering Llama-2-13B, by strategy.",
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 40], help="pruned and dense (32 40)")
    parser.add_argument("--gpus", type=int, help="as in the config")
    parser.add_argument("--capacity", type=float, default=80.0, metavar="GB", help="of one GPU (%(default)g)")
    parser.add_argument(
        "--response-share",
        type=float,
        default=0.5,
        help="share of the tokens that are response, and so go through the head (%(default)g; Alpaca has 0.49)",
    )
    options = parser.parse_args(arguments)
    config = parts.read(CONFIG)
    model, data, trainer = config["model"], config["data"], config["trainer"]
    gpus = options.gpus or trainer["devices"]
    tokens = data["batch_size"] * data["cutoff"]
    part = trainer["strategy"]["init_args"]
    assert part["reduce_bucket_size"] == REDUCE_BUCKET
    shipped = cast(Strategy, f"deepspeed_stage_{part['stage']}")
    fits = True
    for layers in options.layers:
        sizes = llama2_13b(layers, model["lora"]["r"])
        responses = int(tokens * options.response_share)
        print(
            f"Llama-2-13B with {layers} layers: {sizes.frozen / GB:.2f} billion parameters in bf16, "
            f"{sizes.trainable / 1e6:.1f} million in adapters; {tokens} tokens a micro-batch, {responses} of them "
            f"response; {gpus} GPUs of {options.capacity:g} GB. GB on each GPU:\n"
        )
        print(table(sizes, gpus, tokens, responses, options.capacity * GB) + "\n")
        fits &= training_memory(sizes, shipped, gpus, tokens, responses).total <= options.capacity * GB
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
