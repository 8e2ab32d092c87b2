"""Memory that training with LoRA takes on each GPU, by arithmetic.

Left out are the CUDA context and NCCL (about 1 GB), what the allocator loses to fragments, and the temporaries of the
optimizer step. ``tests/slm_pl/test_training_memory.py`` holds the formulas against bytes that a small model takes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from slm_pl.compression.architecture import ARCHITECTURES, config_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GB = 1e9
BF16, FP32 = 2, 4  # bytes

# Lightning's names; `single_device` is one process without any of them.
Strategy = Literal[
    "single_device", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_3_offload"
]
# What Lightning 2.6 passes to DeepSpeed, and DeepSpeed's own defaults where it passes nothing, in parameters.
REDUCE_BUCKET = 50_000_000  # of configs/parts/strategy_deepspeed_*.yaml; Lightning's default is four times that
MAX_LIVE_PARAMETERS = 1_000_000_000
PERSISTENCE_THRESHOLD = 100_000


@dataclass(frozen=True)
class Sizes:
    """What the formulas need to know of a model with adapters; a plain MLP counts as a gated one, which takes more.

    Attributes:
        frozen: Parameters of the base model.
        trainable: Parameters of the adapters.
        persistent: Parameters, frozen or trainable, in tensors that ZeRO stage 3 leaves whole on every GPU.
        layers: Decoder layers.
        hidden: Width of the hidden states.
        query: Width of all query heads together.
        key_value: Width of all key heads together.
        intermediate: Width of the MLP.
        heads: Query heads.
        vocabulary: Rows of the language-model head.
        rank: Of the adapters; all seven projections have one.
    """

    frozen: int
    trainable: int
    persistent: int
    layers: int
    hidden: int
    query: int
    key_value: int
    intermediate: int
    heads: int
    vocabulary: int
    rank: int

    @classmethod
    def of(cls, model: nn.Module, config: "PreTrainedConfig", rank: int) -> "Sizes":
        """Counts the parameters of a model that PEFT wrapped; those on the meta device count as well."""
        parameters = list(model.parameters())
        text: Any = config.get_text_config()
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        width = ARCHITECTURES[config.model_type].intermediate
        return cls(
            frozen=sum(p.numel() for p in parameters if not p.requires_grad),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            persistent=sum(p.numel() for p in parameters if p.numel() <= PERSISTENCE_THRESHOLD),
            layers=config_layers(config),
            hidden=text.hidden_size,
            query=heads * head,
            key_value=(getattr(text, "num_key_value_heads", None) or heads) * head,
            intermediate=getattr(text, width) if width else 4 * text.hidden_size,
            heads=heads,
            vocabulary=text.vocab_size,
            rank=rank,
        )


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU, and in the host memory for each GPU.

    Attributes:
        weights: Frozen weights.
        adapters: Trainable weights, as the forward pass uses them.
        gradients: Of the adapters, kept until the optimizer step.
        optimizer: AdamW's two moments.
        master: Copies of the adapters in fp32 that the optimizer updates.
        buffers: Of the communication, and the parameters that stage 3 has gathered.
        layer_inputs: Hidden states kept for the backward pass.
        layer_peak: One layer that is computed again, and its backward pass.
        head_peak: Logits and loss of the response tokens.
        host: Main memory.
    """

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    master: float
    buffers: float
    layer_inputs: float
    layer_peak: float
    head_peak: float
    host: float = 0.0

    @property
    def state(self) -> float:
        """What is there between two steps."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.master + self.buffers

    @property
    def activations(self) -> float:
        """Peak of the activations: the head has done its backward pass before the first layer is computed again."""
        return self.layer_inputs + max(self.layer_peak, self.head_peak)

    @property
    def total(self) -> float:
        """Peak."""
        return self.state + self.activations


def saved_by_layer(sizes: Sizes, tokens: int, mask_bytes: int = 1) -> int:
    """Bytes that one decoder layer saves for its backward pass, computed in bf16 with LoRA and its dropout.

    The weights are frozen, so a projection saves nothing of its input; its adapter does. With T tokens, of width h
    (hidden), q (query), k (key, and as much for value), m (intermediate), and a heads:

    * two norms: their inputs in fp32 and a factor for each token, 2 x 4 T (h + 1);
    * seven adapters: the input after dropout, in bf16, and the mask of the dropout, (2 + mask) T (5 h + q + m), and the
      low-rank activation, 7 x 2 T r;
    * attention: query, key, value and output in bf16, and the log-sum in fp32 for each head, 2 T (2 q + 2 k) + 4 T a;
    * MLP: gate, its activation and up, 3 x 2 T m.

    Args:
        sizes: Of the model.
        tokens: Of a micro-batch.
        mask_bytes: Bytes of one entry of a dropout mask: 1 on a GPU; on a CPU PyTorch keeps it in the input's dtype.
    """
    h, q, k, m = sizes.hidden, sizes.query, sizes.key_value, sizes.intermediate
    norms = 2 * FP32 * (h + 1)
    adapters = (BF16 + mask_bytes) * (5 * h + q + m) + 7 * BF16 * sizes.rank
    attention = BF16 * (2 * q + 2 * k) + FP32 * sizes.heads
    return tokens * (norms + adapters + attention + 3 * BF16 * m)


def training_memory(
    sizes: Sizes,
    strategy: Strategy,
    gpus: int,
    tokens: int,
    response_tokens: int,
    mask_bytes: int = 1,
    bucket: int = REDUCE_BUCKET,
) -> TrainingMemory:
    r"""Peak memory of LoRA training with ``precision: bf16-true`` and gradient checkpointing.

    With F frozen and A trainable parameters on N GPUs (a = A / N, f = F / N), in bytes:

    ============  ==============  ==============  ==============  ============================  ===================
    \\             single device   ddp             stages 1, 2     stage 3                       stage 3, offload
    ============  ==============  ==============  ==============  ============================  ===================
    weights       2 F  (bf16)     2 F             2 F             2 f                           host
    adapters      2 A  (bf16)     4 A  (fp32)     2 A             2 a                           host
    gradients     2 A  (bf16)     4 A  (fp32)     2 A, 2 a        2 a                           host
    optimizer     4 A  (bf16)     8 A  (fp32)     8 a  (fp32)     8 a  (fp32)                   host
    master        none            none            4 a  (fp32)     4 a  (fp32)                   host
    buffers       none            4 A (buckets)   2 x 2 B         2 B + 2 P + 2 min(F + A, L)   as stage 3
    ============  ==============  ==============  ==============  ============================  ===================

    The first column is Lightning's ``bf16-true`` as it is by itself, all in bf16, for comparison with measured bytes.
    This project keeps adapters, and so their gradients and moments, in fp32 (ddp; that their inputs are cast for it
    is not counted). DeepSpeed's optimizer for bf16 updates a copy in fp32 of each GPU's share of the adapters, with
    moments in fp32. Its gradients are in bf16: whole on each GPU in stage 1, a share from stage 2 on. B is the bucket
    in which it reduces gradients, allocated whole however few the gradients are, twice in stages 1 and 2
    (``overlap_comm``). P are the parameters in tensors too small to be split, L the most that stage 3 keeps gathered:
    an upper bound.

    Activations do not depend on the strategy. With T tokens of width h in a micro-batch, R response tokens and a
    vocabulary of V:

    * layer inputs: layers x 2 T h, and the input of the final norm in fp32, 4 T h;
    * layer peak: :func:`saved_by_layer`, and the gradients in flight while the MLP goes back, 4 x 2 T m;
    * head peak: the logits of the response tokens three times in fp32, 3 x 4 R V: log-probabilities, their gradient and
      that of the logits.

    Args:
        sizes: Of the model with its adapters.
        strategy: Lightning's name.
        gpus: Number of processes.
        tokens: Of a micro-batch on one GPU, padding included.
        response_tokens: Of these, the ones whose logits are computed.
        mask_bytes: See :func:`saved_by_layer`.
        bucket: Parameters that DeepSpeed reduces at a time.
    """
    frozen, trainable = sizes.frozen, sizes.trainable
    sharded = trainable / gpus
    activations = (
        sizes.layers * tokens * sizes.hidden * BF16 + tokens * sizes.hidden * FP32,
        saved_by_layer(sizes, tokens, mask_bytes) + 4 * BF16 * tokens * sizes.intermediate,
        3 * FP32 * response_tokens * sizes.vocabulary,
    )
    if strategy in ("single_device", "ddp"):
        dtype, buckets = (FP32, FP32 * trainable) if strategy == "ddp" else (BF16, 0)
        state = (BF16 * frozen, dtype * trainable, dtype * trainable, 2 * dtype * trainable, 0)
        return TrainingMemory(*state, buckets, *activations)
    optimizer, master = 2 * FP32 * sharded, FP32 * sharded
    if strategy in ("deepspeed_stage_1", "deepspeed_stage_2"):
        gradients = BF16 * (trainable if strategy == "deepspeed_stage_1" else sharded)
        buckets = 2 * BF16 * bucket
        return TrainingMemory(BF16 * frozen, BF16 * trainable, gradients, optimizer, master, buckets, *activations)
    shares = (BF16 * frozen / gpus, BF16 * sharded, BF16 * sharded, optimizer, master)
    buffers = BF16 * (bucket + sizes.persistent + min(frozen + trainable, MAX_LIVE_PARAMETERS))
    if strategy == "deepspeed_stage_3":
        return TrainingMemory(*shares, buffers, *activations)
    return TrainingMemory(0, 0, 0, 0, 0, buffers, *activations, host=sum(shares))
