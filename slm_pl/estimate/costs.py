"""What the phases of a run take of each GPU, by arithmetic on the sizes of a model."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from slm_pl.compression.architecture import hidden_size, num_layers
from slm_pl.compression.plan import count_parameters
from slm_pl.estimate.rehearsal import Work, layer_operations
from slm_pl.recovery.memory import BF16, FP32, REDUCE_BUCKET, Sizes, Strategy, saved_by_layer, training_memory
from slm_pl.recovery.objective import LOGITS_BUDGET

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PhaseName = Literal["search", "least squares", "recovery", "perplexity", "zero-shot", "speed"]
LOGITS_BYTES = 3 * 48 * 2**20  # of one slice in a search: its logits, their float32 form and a temporary


@dataclass(frozen=True)
class Machine:
    """What one GPU, or this computer, can do.

    Args:
        name: For tables.
        flops: Operations per second of products in bfloat16 or float16.
        flops32: In float32.
        flops64: In float64.
        bytes_per_s: From its memory.
        memory: Bytes of it; None if nobody asks.
    """

    name: str
    flops: float
    flops32: float
    flops64: float
    bytes_per_s: float
    memory: float | None = None


# NVIDIA's data sheets: bfloat16 and float64 on tensor cores, without sparsity; float32 without TF32, as PyTorch has it.
MACHINES = {
    "a100": Machine("A100 80 GB", 312e12, 19.5e12, 19.5e12, 2.039e12, 80e9),
    "h100": Machine("H100 80 GB", 989.4e12, 66.9e12, 66.9e12, 3.35e12, 80e9),
}


@dataclass(frozen=True)
class Phase:
    """What a phase takes of each GPU.

    Args:
        name: Which.
        gpus: That work at it together; the others wait.
        flops: Operations of products in the dtype of the weights.
        flops64: In float64.
        bytes: Read: the weights, once for each batch that goes through them.
        memory: Most bytes at a time.
        itemsize: Bytes of a weight.
    """

    name: PhaseName
    gpus: int
    flops: float
    flops64: float
    bytes: float
    memory: float
    itemsize: int = 2

    def seconds(self, machine: Machine, utilisation: float) -> float:
        """Time at a share of the machine's peak; either the operations or the bytes take it."""
        peak = machine.flops if self.itemsize <= 2 else machine.flops32
        least = max(self.flops / peak, self.bytes / machine.bytes_per_s) + self.flops64 / machine.flops64
        return least / utilisation


@dataclass(frozen=True)
class Text:
    """Samples that go through the model.

    Args:
        samples: So many.
        length: Tokens of each.
        batch: Samples at once.
    """

    samples: int
    length: int
    batch: int

    def share(self, gpus: int) -> "Text":
        """What the GPU has that has most."""
        return replace(self, samples=math.ceil(self.samples / gpus))

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.samples * self.length

    @property
    def batches(self) -> int:
        """How often the weights are read."""
        return math.ceil(self.samples / self.batch)

    @property
    def batch_tokens(self) -> int:
        """Of the largest batch."""
        return min(self.batch, self.samples) * self.length


@dataclass(frozen=True)
class Model:
    """The sizes that the arithmetic needs.

    Args:
        empty: The dense model, without weights.
        itemsize: Bytes of a weight.
        depth: Layers that are left, by those of the dense model.
        width: What is left of each.
        streamed: Whether a search reads each layer when it is run, and the next one meanwhile.
    """

    empty: "PreTrainedModel"
    itemsize: int
    depth: float = 1.0
    width: float = 1.0
    streamed: bool = False

    @property
    def whole_layers(self) -> float:
        """Decoder layers of the dense model's width that would be as large."""
        return num_layers(self.empty) * self.depth * self.width

    @property
    def hidden(self) -> int:
        """Width of the hidden state."""
        return hidden_size(self.empty)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.empty.config.get_text_config().vocab_size)

    @property
    def layer_parameters(self) -> float:
        """Of one decoder layer."""
        return count_parameters(self.empty) * (1 - self._rest) / num_layers(self.empty)

    @property
    def _rest(self) -> float:
        from slm_pl.compression.target import layers_share

        return 1 - layers_share(self.empty, num_layers(self.empty))

    @property
    def parameters(self) -> float:
        """Of what is left."""
        return self.layer_parameters * self.whole_layers + count_parameters(self.empty) * self._rest

    @property
    def nbytes(self) -> float:
        """Of its weights."""
        return self.parameters * self.itemsize

    @property
    def held(self) -> float:
        """Bytes of the weights that a search has in memory."""
        layers = min(2, self.whole_layers) if self.streamed else self.whole_layers
        return self.nbytes - (self.whole_layers - layers) * self.layer_parameters * self.itemsize

    def forward(self, tokens: float, length: int) -> float:
        """Operations of all layers."""
        return self.whole_layers * layer_operations(self.empty, 1, length) * tokens

    def head(self, tokens: float) -> float:
        """Operations of the language-model head."""
        return 2 * self.vocabulary * self.hidden * tokens


def search_cost(
    name: Literal["search", "least squares"],
    model: Model,
    work: Work,
    text: Text,
    gpus: int,
    inputs: int,
    budget: float | None = None,
) -> Phase:
    """A search, or the fits of least squares.

    Memory: the weights; the hidden states of the text behind every layer (of a chunk, for fits); with normal
    equations, two matrices of their size; of one batch, the inputs of the maps of one layer; slices of logits; with
    gradients, what a layer saves for them and its gradients in float32. Or less, if the method has a budget.

    Args:
        name: Of the phase.
        model: As the method finds it.
        work: As it was rehearsed.
        text: That is looked at.
        gpus: That share its samples.
        inputs: Of the map that writes a layer's output.
        budget: Most bytes beside the weights, of a method that has such a limit.
    """
    own = text.share(gpus)
    layer = layer_operations(model.empty, own.tokens, own.length)
    memory = model.held + own.batch_tokens * (4 * model.hidden + 3 * inputs) * model.itemsize
    behind = num_layers(model.empty) * model.depth + 1
    states = 2 * own.batch_tokens if name == "least squares" else behind * own.tokens
    memory += states * model.hidden * model.itemsize
    if work.heads:
        memory += LOGITS_BYTES
    if work.differentiates:
        saved = own.batch_tokens * (10 * model.hidden + 4 * inputs) * model.itemsize
        memory += saved + 4 * model.layer_parameters
    if work.solutions:
        memory += 2 * 8 * inputs**2
    if budget is not None:
        memory = min(memory, model.held + budget)
    products = work.products * 2 * own.tokens * inputs * (inputs + model.hidden)
    solved = work.solutions * inputs**3 / 3 + work.columns * inputs**2 * model.hidden
    read = work.layers * model.layer_parameters + work.heads * model.vocabulary * model.hidden
    return Phase(
        name,
        gpus,
        work.layers * layer + work.heads * model.head(own.tokens),
        products + solved,
        read * model.itemsize * own.batches,
        memory,
        model.itemsize,
    )


@dataclass(frozen=True)
class Recipe:
    """How the compressed model is trained.

    Args:
        rows: Training examples of a step, over all GPUs.
        steps: Optimizer steps.
        batch: Examples of a micro-batch on a GPU.
        length: Tokens of an example, on average.
        longest: Most tokens of an example.
        answered: Share of the tokens whose logits are computed.
        validated: Examples that are validated on, over the whole run.
        validation_batch: Of these in a batch on a GPU.
        checkpointed: Layers are run again in the backward pass.
        teacher: The dense model looks at every example, too.
        strategy: Lightning's name.
        offloaded: The optimizer's state is in main memory.
        bucket: Parameters that DeepSpeed reduces at a time.
    """

    rows: int
    steps: int
    batch: int
    length: float
    longest: int
    answered: float
    validated: float
    validation_batch: int
    checkpointed: bool
    teacher: bool
    strategy: Strategy
    offloaded: bool = False
    bucket: int = REDUCE_BUCKET


def recovery_cost(model: Model, dense: Model, sizes: Sizes, recipe: Recipe, gpus: int) -> Phase:
    """Training with adapters.

    A token goes forward through the layers, its gradient back through them (as many operations: weights are frozen),
    and, with checkpointing, forward a second time; the adapters' own gradients take as much as their forward pass. The
    head does so for the tokens of the responses. Without adapters the weights' gradients come on top.

    Args:
        model: What is left.
        dense: The teacher.
        sizes: Of the model that is left with its adapters, or without any.
        recipe: How.
        gpus: That share every step.
    """
    passes = 2 + recipe.checkpointed + (sizes.frozen == 0)
    tokens = recipe.rows * recipe.steps * recipe.length / gpus
    seen = recipe.validated * recipe.length / gpus
    length = round(recipe.length)
    adapters = 2 * sizes.trainable if sizes.frozen else 0
    flops = passes * model.forward(tokens, length) + (passes + 1) * adapters * tokens
    flops += (2 + (sizes.frozen == 0)) * model.head(recipe.answered * tokens)
    flops += model.forward(seen, length) + model.head(recipe.answered * seen)
    batches = recipe.steps * math.ceil(recipe.rows / (recipe.batch * gpus))
    read = passes * batches * model.nbytes + recipe.validated / (recipe.validation_batch * gpus) * model.nbytes
    memory = _training_bytes(model.itemsize, sizes, recipe, gpus)
    if recipe.teacher:
        flops += dense.forward(tokens, length) + dense.head(recipe.answered * tokens)
        read += batches * dense.nbytes
        memory += dense.nbytes
    return Phase("recovery", gpus, flops, 0.0, read, memory, model.itemsize)


def _training_bytes(itemsize: int, sizes: Sizes, recipe: Recipe, gpus: int) -> float:
    """Peak of training, from :func:`~slm_pl.recovery.memory.training_memory`, whose weights are in bfloat16.

    Adapters, their gradients and moments are in float32 everywhere but under DeepSpeed; weights that are trained
    themselves are in their own dtype. Of logits, no more than the slices that the loss keeps.
    """
    tokens = recipe.batch * recipe.longest
    found = training_memory(sizes, recipe.strategy, gpus, tokens, round(recipe.answered * tokens), bucket=recipe.bucket)
    wide = itemsize / BF16
    logits = min(found.head_peak, 3 * LOGITS_BUDGET)
    if recipe.checkpointed:
        activations = found.layer_inputs * wide + max(found.layer_peak * wide, logits)
    else:
        activations = sizes.layers * saved_by_layer(sizes, tokens) * wide + logits
    if recipe.strategy in ("single_device", "ddp"):
        trained = FP32 if sizes.frozen else itemsize
        reduced = trained * sizes.trainable if recipe.strategy == "ddp" else 0
        state = float(itemsize * sizes.frozen + 4 * trained * sizes.trainable + reduced)
    else:
        state = found.state + (wide - 1) * found.weights
        state -= found.optimizer + found.master if recipe.offloaded else 0
    return state + activations


def reading_cost(name: PhaseName, model: Model, texts: Iterable[Text], gpus: int) -> Phase:
    """Passes over texts with the logits of every token, as perplexity and questions take them.

    Memory: the weights, and of one batch the logits in their dtype and in float32.
    """
    flops, read, largest = 0.0, 0.0, 0
    for text in texts:
        own = text.share(gpus)
        flops += model.forward(own.tokens, own.length) + model.head(own.tokens)
        read += own.batches * model.nbytes
        largest = max(largest, own.batch_tokens)
    logits = largest * model.vocabulary * (model.itemsize + 4)
    return Phase(name, gpus, flops, 0.0, read, model.nbytes + logits, model.itemsize)


@dataclass(frozen=True)
class Generation:
    """Runs of generation.

    Args:
        runs: So many.
        batch: Prompts at once.
        prompt: Tokens of each.
        new: Tokens to generate for each; 0 for one pass over the prompts.
    """

    runs: int
    batch: int
    prompt: int
    new: int


def generation_cost(model: Model, runs: Sequence[Generation], key_values: int) -> Phase:
    """Generation with a cache: every new token reads the weights and what is cached.

    Args:
        model: What is left.
        runs: What is timed.
        key_values: Values that one token adds to the cache of one layer.
    """
    flops, read, largest = 0.0, 0.0, 0.0
    for run in runs:
        steps = max(run.new - 1, 0)
        cached = run.batch * (run.prompt + run.new) * key_values * model.whole_layers * model.itemsize
        seen = cached * (run.prompt + run.new / 2) / (run.prompt + run.new)
        flops += run.runs * model.forward(run.batch * (run.prompt + steps), run.prompt + run.new // 2)
        flops += run.runs * model.head(run.batch * max(run.new, 1))
        read += run.runs * (model.nbytes * (1 + steps) + seen * steps)
        largest = max(largest, cached + run.batch * run.prompt * model.hidden * 8 * model.itemsize)
    return Phase("speed", 1, flops, 0.0, read, model.nbytes + largest, model.itemsize)
