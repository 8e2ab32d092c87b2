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
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"] * 2
CONFIGS = {
    "bloom": {**COMMON, "n_head": 4},
    "gemma2": {**COMMON, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**COMMON, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": SLIDING},
    "glm4": {**COMMON, "head_dim": 8},
    "gpt_neox": {**COMMON, "rotary_pct": 0.25},
    "granite": {**COMMON, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": 8},
    "mixtral": {**COMMON, "num_local_experts": 4, "sliding_window": 8},
    "olmo2": COMMON,
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0},
    "phi3": {**COMMON, "sliding_window": 8},
    "qwen2": {**COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {**COMMON, "head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3_moe": {
        **COMMON,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
}
"""Config arguments by ``model_type``. Where the architecture has a sliding window, only some layers slide."""


def pico_model(model_type: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model with random weights, also where the initialisation is constant: norms and biases differ by layer."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    attention = "eager" if model_type in ("bloom", "gemma2") else "sdpa"  # what loading chooses for them
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
            elif ".layers." in name or ".h." in name:
                p.mul_(4)  # so that a layer changes the hidden state by more than rounding
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    return model.eval()
