"""The formulas of ``slm_pl.recovery.memory`` against the bytes that a small model takes on the CPU."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from slm_pl.memory import TensorBytes
from slm_pl.recovery.memory import REDUCE_BUCKET, Sizes, TrainingMemory, saved_by_layer, training_memory
from tests.benchmarks.training_memory import PROJECTIONS, llama2_13b, main
from tests.helpers.pico import pico_model

pytestmark = pytest.mark.usefixtures("one_thread")

RANK, ROWS, LENGTH = 4, 2, 48
TOKENS = ROWS * LENGTH
CPU_MASK = 2  # PyTorch keeps a dropout mask in bf16 on the CPU


@pytest.fixture
def model() -> PeftModel:
    """Six layers in bf16, with grouped keys so that no two widths are equal, adapted as `fit` does it."""
    base = pico_model(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=20)
    config = LoraConfig(r=RANK, lora_alpha=8, lora_dropout=0.05, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(base.to(torch.bfloat16), config, autocast_adapter_dtype=False)
    return adapted.train()


@pytest.fixture
def sizes(model: PeftModel) -> Sizes:
    return Sizes.of(model, model.base_model.model.config, RANK)


def checkpointed(model: PeftModel) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def loss_of(model: PeftModel, length: int = LENGTH) -> Tensor:
    ids = torch.randint(3, 512, (ROWS, length), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_bytes(module: nn.Module, work: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd saves while the work runs; parameters and buffers do not count."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in storages.values())


def test_weights_gradients_and_moments_on_one_device(model, sizes):
    memory = training_memory(sizes, "single_device", 1, TOKENS, TOKENS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    loss_of(model).backward()
    optimizer.step()
    assert nbytes([p for p in model.parameters() if not p.requires_grad]) == memory.weights
    assert nbytes(trained) == memory.adapters
    assert nbytes([p.grad for p in trained]) == memory.gradients
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert nbytes(moments) == memory.optimizer
    assert (memory.master, memory.buffers, memory.host) == (0, 0, 0)
    # Beside the moments AdamW keeps one number for each tensor, which the formula leaves out.
    assert {name for state in optimizer.state.values() for name in state} == {"exp_avg", "exp_avg_sq", "step"}


def test_saved_by_one_layer(model, sizes):
    inner = model.base_model.model.model
    hidden = torch.randn(ROWS, LENGTH, 64, dtype=torch.bfloat16, requires_grad=True)
    rotary = inner.rotary_emb(hidden, torch.arange(LENGTH)[None])
    saved = saved_bytes(model, lambda: inner.layers[2](hidden, position_embeddings=rotary, attention_mask=None))
    # Exact, but for the cosines and sines of the positions, which all layers share.
    assert saved - nbytes(list(rotary)) == saved_by_layer(sizes, TOKENS, CPU_MASK)


def test_saved_by_a_model_with_gradient_checkpointing(model, sizes):
    plain = saved_bytes(model, lambda: loss_of(model))
    checkpointed(model)
    saved = saved_bytes(model, lambda: loss_of(model))
    memory = training_memory(sizes, "single_device", 1, TOKENS, TOKENS, CPU_MASK)
    log_probabilities = memory.head_peak / 3
    # What the formula leaves out: the factor of the final norm (4 bytes a token), the labels (8 bytes a token), and
    # the number of labels that count, which divides the loss.
    assert saved == memory.layer_inputs + log_probabilities + 12 * TOKENS + 4
    # Without checkpointing all layers are saved, and the cosines and sines. The embeddings are frozen: nothing goes
    # back through the first layer's norm, nor through the dropout before its query, key and value.
    layers = sizes.layers * saved_by_layer(sizes, TOKENS, CPU_MASK)
    rotary = 2 * 2 * LENGTH * sizes.query // sizes.heads
    first = TOKENS * (4 * (64 + 1) + 3 * CPU_MASK * 64)
    assert plain == layers + rotary - first + 4 * TOKENS * 64 + log_probabilities + 12 * TOKENS + 4


@pytest.mark.parametrize("length", [48, 128])
@pytest.mark.parametrize("peak", ["head_peak", "layer_peak"])
def test_peak_of_a_step(model, sizes, length, peak):
    checkpointed(model)
    inner = model.base_model.model.model
    tokens = ROWS * length
    with TensorBytes(model) as measured:
        if peak == "head_peak":
            loss_of(model, length).backward()
        else:  # no head at all, so that the layers make the peak
            ids = torch.zeros(ROWS, length, dtype=torch.int64)
            inner(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    memory = training_memory(sizes, "single_device", 1, tokens, tokens if peak == "head_peak" else 0, CPU_MASK)
    assert max(memory.head_peak, memory.layer_peak) == getattr(memory, peak)
    # The formula is an upper bound. It counts the gradients of all adapters and the final norm's input at the peak,
    # where at most one of the two is still or already there; a few small temporaries of the MLP are rounded up.
    expected = memory.gradients + memory.activations
    assert 0.8 * expected < measured.peak <= expected


def by_hand(**changes: float) -> TrainingMemory:
    """8 GPUs, 800 frozen and 80 trainable parameters; activations of 10 tokens, 3 of them response, by hand."""
    norms, adapters, attention, mlp = 2 * 4 * 17, 3 * (5 * 16 + 12 + 20) + 7 * 2 * 2, 2 * (24 + 12) + 4 * 3, 3 * 2 * 20
    activations = {
        "layer_inputs": 5 * 10 * 16 * 2 + 10 * 16 * 4,
        "layer_peak": 10 * (norms + adapters + attention + mlp) + 4 * 2 * 10 * 20,
        "head_peak": 3 * 4 * 3 * 50,
    }
    state = {"weights": 1600, "adapters": 160, "gradients": 160, "optimizer": 320, "master": 0, "buffers": 0}
    return TrainingMemory(**{**state, **activations, **changes})


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("single_device", by_hand()),
        ("ddp", by_hand(adapters=320, gradients=320, optimizer=640, buffers=320)),
        ("deepspeed_stage_1", by_hand(optimizer=80, master=40, buffers=200e6)),
        ("deepspeed_stage_2", by_hand(gradients=20, optimizer=80, master=40, buffers=200e6)),
        (
            "deepspeed_stage_3",
            by_hand(weights=200, adapters=20, gradients=20, optimizer=80, master=40, buffers=100e6 + 2 * 30 + 2 * 880),
        ),
        (
            "deepspeed_stage_3_offload",
            by_hand(weights=0, adapters=0, gradients=0, optimizer=0, buffers=100e6 + 2 * 30 + 2 * 880, host=360),
        ),
    ],
)
def test_strategies_by_hand(strategy, expected):
    sizes = Sizes(800, 80, 30, 5, hidden=16, query=12, key_value=6, intermediate=20, heads=3, vocabulary=50, rank=2)
    memory = training_memory(sizes, strategy, 8, 10, 3)
    assert memory == expected
    state = sum(getattr(expected, name) for name in ("weights", "adapters", "gradients", "optimizer", "master"))
    assert memory.total == state + expected.buffers + expected.layer_inputs + expected.layer_peak


def test_llama2_13b_is_counted_as_published():
    sizes = llama2_13b(40, 8)
    assert sizes.frozen == 13_015_864_320
    assert sizes.trainable == 40 * 8 * (4 * (5120 + 5120) + 3 * (5120 + 13824))
    # Stage 3 leaves whole: two norms a layer and the last one, and the adapters' halves at the hidden width.
    assert sizes.persistent == 81 * 5120 + 40 * (4 * 2 + 3) * 8 * 5120
    assert llama2_13b(30, 8).frozen == sizes.frozen - 10 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120)
    stage_3 = training_memory(sizes, "deepspeed_stage_3", 8, 1024, 512)
    assert stage_3.buffers == 2 * (REDUCE_BUCKET + sizes.persistent + 1_000_000_000)


def test_tables(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "13.02 billion parameters" in printed
    assert printed.count("| deepspeed stage 2 |") == 2
    assert main(["--layers", "40", "--capacity", "16"]) == 1  # the weights alone are more
