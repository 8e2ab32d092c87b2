"""Models that are the real thing but for their size: one for each supported architecture."""

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": 8},
    "qwen2": {**COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {**COMMON, "head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}
"""Config arguments by ``model_type``. Where the architecture has a sliding window, only some layers slide."""


def pico_model(model_type: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model with random weights, also where the initialisation is constant: norms and biases differ by layer."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
            elif "layers" in name:
                p.mul_(4)  # so that a layer changes the hidden state by more than rounding
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    return model.eval()
