"""The plan: what a method decided, why, and on which data, as frozen dataclasses <-> ``plan.json``.

A plan is computed once, written before any weight changes, and can be applied again without the search. The
same inputs give the same plan byte for byte, so nothing that varies from run to run (timings, dates) is in it.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from slm_pl import files
from slm_pl.compression.architecture import MOST_LAYERS, Group, num_layers
from slm_pl.documents import parse_json
from slm_pl.errors import UsageError
from slm_pl.sealing import SEAL, broken_seal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SCHEMA_VERSION = 1
PLAN_FILE = "plan.json"

Consolidation = Literal["keep_top", "keep_bottom", "sum", "mean"]
"""How the projections of a window become those of one layer; the formulas are in :mod:`slm_pl.compression.surgery`."""
OtherParameters = Literal["top", "bottom", "mean"]
"""Whose norms and biases the merged layer takes."""

_ALLOWED = {
    "num_layers": (1, MOST_LAYERS),
    "num_parameters": (1, 10**15),
    **dict.fromkeys(("low", "high", "layer", "layers"), (0, MOST_LAYERS - 1)),
}
"""Bounds of whole numbers in a plan's file, by the name of the field; they keep its reader from endless work."""
_LONGEST = 4096
"""Characters of a name, a path or an id in a plan's file."""

JSONValue = str | int | float | bool | None | list["JSONValue"] | dict[str, "JSONValue"]


@dataclass(frozen=True)
class MergeLayers:
    """Merges the window of decoder layers ``low..high`` (both included, original 0-based indices) into one layer."""

    low: int
    high: int
    consolidation: Consolidation = "keep_top"
    other_parameters: OtherParameters = "top"
    kind: Literal["merge_layers"] = "merge_layers"

    @property
    def host(self) -> int:
        """The layer whose module stays, and with it its kind of attention: the top, or what ``keep_bottom`` keeps."""
        return self.low if self.consolidation == "keep_bottom" else self.high


@dataclass(frozen=True)
class DropLayers:
    """Removes decoder layers (original 0-based indices)."""

    layers: tuple[int, ...]
    kind: Literal["drop_layers"] = "drop_layers"


@dataclass(frozen=True)
class KeepChannels:
    """Makes a decoder layer narrower: of one group, only these units stay.

    Attributes:
        layer: Which decoder layer.
        group: ``attention``: the units are KV groups (heads, without grouped queries); ``mlp``: intermediate channels.
        indices: The units that stay, ascending; none empties the group.
        bias: Name of the plan's tensor that is added to the bias of the group's output map, ``[hidden]``; or null.
    """

    layer: int
    group: Group
    indices: tuple[int, ...]
    bias: str | None = None
    kind: Literal["keep_channels"] = "keep_channels"


@dataclass(frozen=True)
class KeepHidden:
    """Makes the hidden state narrower, in all layers, the embeddings and the head: only these channels stay."""

    indices: tuple[int, ...]
    kind: Literal["keep_hidden"] = "keep_hidden"


@dataclass(frozen=True)
class RefitOutput:
    """Gives the map with which a group of a decoder layer writes the hidden state other weights.

    Attributes:
        layer: Which decoder layer; it stays, and its own weights are what the window it hosts becomes otherwise.
        group: ``attention`` or ``mlp``.
        weight: Name of the plan's tensor that is the new weight, ``[hidden, inputs]``.
        bias: Name of the plan's tensor that is the new bias, ``[hidden]``; null where the map has none.
    """

    layer: int
    group: Group
    weight: str
    bias: str | None = None
    kind: Literal["refit_output"] = "refit_output"


Step = MergeLayers | DropLayers | KeepChannels | KeepHidden | RefitOutput
STEP_KINDS: dict[str, type[Step]] = {
    "merge_layers": MergeLayers,
    "drop_layers": DropLayers,
    "keep_channels": KeepChannels,
    "keep_hidden": KeepHidden,
    "refit_output": RefitOutput,
}


@dataclass(frozen=True)
class Base:
    """The model that a plan was computed on.

    Attributes:
        pretrained: What the user gave as ``pretrained``.
        revision: The commit that the Hub resolved, or null for local files.
        model_type: ``config.model_type``.
        num_layers: Decoder layers.
        num_parameters: All parameters; tied tensors count once.
        config_sha256: :func:`config_fingerprint`.
    """

    pretrained: str
    revision: str | None
    model_type: str
    num_layers: int
    num_parameters: int
    config_sha256: str

    @staticmethod
    def of(model: "PreTrainedModel") -> "Base":
        """Describes a Hugging Face causal language model."""
        config = model.config
        return Base(
            pretrained=str(config._name_or_path),
            revision=getattr(config, "_commit_hash", None),
            model_type=config.model_type,
            num_layers=num_layers(model),
            num_parameters=count_parameters(model),
            config_sha256=config_fingerprint(config.to_dict()),
        )


@dataclass(frozen=True)
class Method:
    """The callback that made a plan: its import path and the arguments that decide the result."""

    class_path: str
    init_args: dict[str, JSONValue]


@dataclass(frozen=True)
class Calibration:
    """The calibration set: where it came from, its size, and the sha256 of its token ids."""

    source: str
    samples: int
    sequence_length: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What to do to a model, and how that was decided.

    Attributes:
        base: The model the indices in ``steps`` refer to.
        method: Who decided.
        calibration: On which data; null for methods that look at none.
        steps: What :func:`slm_pl.compression.surgery.apply` carries out. All indices are those of ``base``.
        trace: Everything that was tried, in order.
        outcome: What the search ended with (threshold found, layers removed, whether the last window was cut, …).
        tensors_sha256: :func:`tensors_fingerprint` of ``tensors``; null without any.
        tensors: What steps need beside numbers, by name; in a safetensors file beside ``plan.json``.
    """

    base: Base
    method: Method
    calibration: Calibration | None
    steps: tuple[Step, ...]
    trace: tuple[dict[str, JSONValue], ...] = ()
    outcome: dict[str, JSONValue] = field(default_factory=dict)
    tensors_sha256: str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> str:
        """The plan as text, one line for each step and try, so that a reader and a diff can follow it.

        In ``plan.json`` stands one line more, the sha256 of this text.
        """
        data = asdict(replace(self, tensors={}))
        lines = [f'  "schema_version": {SCHEMA_VERSION}']
        keys = ["base", "method", "calibration", "outcome"]
        for key in keys + (["tensors_sha256"] if self.tensors_sha256 else []):
            lines.append(f"  {json.dumps(key)}: {json.dumps(data[key])}")
        for key in ("steps", "trace"):
            rows = ",\n".join("    " + json.dumps(row) for row in data[key])
            lines.append(f'  "{key}": [\n{rows}\n  ]' if rows else f'  "{key}": []')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @property
    def sha256(self) -> str:
        """Identity of the plan: the hash of its text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def file_text(self) -> str:
        """The text of ``plan.json``: that of the plan, and its :attr:`sha256`."""
        return self.to_json().removesuffix("\n}\n") + _seal_line(self.sha256)

    @property
    def requested_ratio(self) -> float | None:
        """The share of all parameters that was to be removed; None if the target was another one."""
        ratio = self.outcome.get("requested_ratio", self.method.init_args.get("ratio"))
        return ratio if isinstance(ratio, float) else None

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Plan":
        """The same plan with the tensors that its steps name."""
        return replace(self, tensors=dict(tensors), tensors_sha256=tensors_fingerprint(tensors) if tensors else None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan, after its tensors if it has any; each file is whole or absent."""
        assert bool(self.tensors) == (self.tensors_sha256 is not None), "from_dict reads no tensors"
        tensors = tensors_file(path)
        if self.tensors:
            from safetensors.torch import save

            files.write_bytes(tensors, save({name: value.contiguous() for name, value in self.tensors.items()}))
        else:
            with contextlib.suppress(OSError):
                tensors.unlink()  # of an earlier plan
        files.write_text(path, self.file_text)

    @staticmethod
    def load(path: str | os.PathLike[str], tensors: bool = True) -> "Plan":
        """Reads a plan.

        Args:
            path: Of the file.
            tensors: Also read what its steps need beside numbers; without, the plan can be shown and not be applied.

        Raises:
            UsageError: If the file is missing, is not JSON, is of another schema version, lacks a field or is not as
                it was written.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            data = parse_json(text)
        except FileNotFoundError as error:
            raise UsageError(f"There is no plan at {path}. Give the path of a plan.json that slm_pl wrote.") from error
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path} cannot be read as a plan ({error}). Give a plan.json that slm_pl wrote."
            ) from error
        plan = Plan.from_dict(data, str(path))
        if SEAL in data:
            # Of the text, which another version may write otherwise, or, where that was put into another form, of what
            # it says.
            written = text.removesuffix(_seal_line(data[SEAL])) + "\n}\n"
            if data[SEAL] not in (hashlib.sha256(written.encode()).hexdigest(), plan.sha256):
                raise UsageError(broken_seal(path))
        if plan.tensors_sha256 is None or not tensors:
            return plan
        return replace(plan, tensors=_load_tensors(tensors_file(path), plan.tensors_sha256))

    @staticmethod
    def from_dict(data: Any, origin: str) -> "Plan":
        """Builds a plan, without its tensors, from parsed JSON; ``origin`` names it in errors.

        Raises:
            UsageError: If ``data`` is not a plan of this schema version.
        """
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            got = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
            raise UsageError(
                f"{origin} has schema_version {got!r}; this slm_pl reads plans of schema_version {SCHEMA_VERSION}. "
                "Make the plan again, or use the slm_pl that wrote it."
            )
        try:
            steps: list[Step] = []
            for step in data["steps"]:
                if step["kind"] not in STEP_KINDS:
                    raise ValueError(f"step of kind {step['kind']!r}, known are {sorted(STEP_KINDS)}")
                steps.append(_build(STEP_KINDS[step["kind"]], step))
            if not all(isinstance(row, dict) for row in data["trace"]) or not isinstance(data.get("outcome", {}), dict):
                raise ValueError("trace is not a list of objects, or outcome not an object")
            if not isinstance(data.get("tensors_sha256"), str | None):
                raise ValueError(f"tensors_sha256 is {data['tensors_sha256']!r}, not a string or null")
            return Plan(
                base=_build(Base, data["base"]),
                method=_build(Method, data["method"]),
                calibration=None if data["calibration"] is None else _build(Calibration, data["calibration"]),
                steps=tuple(steps),
                trace=tuple(data["trace"]),
                outcome=data.get("outcome", {}),
                tensors_sha256=data.get("tensors_sha256"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{origin} is not a plan that slm_pl can apply ({type(error).__name__}: {error}). "
                "Give a plan.json that slm_pl wrote."
            ) from error


def _seal_line(sha256: object) -> str:
    """The end of ``plan.json``."""
    return f',\n  "{SEAL}": "{sha256}"\n}}\n'


def tensors_file(path: str | os.PathLike[str]) -> Path:
    """Where the tensors of the plan in this file are: ``plan.tensors.safetensors`` beside ``plan.json``."""
    return Path(path).with_suffix(".tensors.safetensors")


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"The plan needs the tensors in {path}, which cannot be read ({error}). Keep both files together."
        ) from error
    if tensors_fingerprint(tensors) != expected:
        raise UsageError(
            f"The tensors in {path} are not those that the plan beside it was made with; a run may have been stopped "
            "between writing the one and the other. Get both from where they came from, or remove both and have the "
            "plan made again."
        )
    return tensors


T = TypeVar("T", bound=Base | Method | Calibration | Step)


def _build(cls: type[T], data: Any) -> T:
    """Builds a flat dataclass from a JSON object, holding the JSON types to the annotations."""
    unknown = set(data) - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}")
    values = {}
    for f in fields(cls):
        if f.name not in data:
            raise ValueError(f"{cls.__name__} lacks the field {f.name!r}")
        value = data[f.name]
        allowed = get_args(f.type)
        if f.type is int and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{cls.__name__}.{f.name} is {value!r}, not an integer")
        if f.type is str and not isinstance(value, str):
            raise ValueError(f"{cls.__name__}.{f.name} is {value!r}, not a string")
        if f.type == (str | None) and not isinstance(value, str | None):
            raise ValueError(f"{cls.__name__}.{f.name} is {value!r}, not a string or null")
        if isinstance(value, str) and len(value) > _LONGEST:
            raise ValueError(f"{cls.__name__}.{f.name} has {len(value):,} characters, allowed are {_LONGEST:,}")
        if allowed and all(isinstance(choice, str) for choice in allowed) and value not in allowed:
            raise ValueError(f"{cls.__name__}.{f.name} is {value!r}, allowed are {list(allowed)}")
        if str(f.type).startswith("dict[") and not isinstance(value, dict):
            raise ValueError(f"{cls.__name__}.{f.name} is {value!r}, not an object")
        if f.type == tuple[int, ...]:
            if not isinstance(value, list) or not all(type(v) is int for v in value):
                raise ValueError(f"{cls.__name__}.{f.name} is {value!r}, not a list of integers")
            value = tuple(value)
        low, high = _ALLOWED.get(f.name, (-math.inf, math.inf))
        for number in value if isinstance(value, tuple) else (value,) if f.type is int else ():
            if not low <= number <= high:
                raise ValueError(f"{cls.__name__}.{f.name} is {number}, allowed are {low:,} to {high:,}")
        values[f.name] = value
    return cls(**values)


def plan_name(number: int) -> str:
    """File name of a model's first, second, … plan."""
    return PLAN_FILE if number == 1 else f"plan.{number}.json"


def plan_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The plans of a model directory in the order they were applied: ``plan.json``, ``plan.2.json``, and so on."""
    directory = Path(directory)
    names = [plan_name(1)]
    while (directory / names[-1]).is_file():
        names.append(plan_name(len(names) + 1))
    return [directory / name for name in names[:-1]]


def load_plans(directory: str | os.PathLike[str], tensors: bool = True) -> list[Plan]:
    """Reads all plans of a model directory, in order; an empty list for a dense model. See :meth:`Plan.load`."""
    return [Plan.load(path, tensors) for path in plan_files(directory)]


def save_plans(plans: list[Plan], directory: str | os.PathLike[str]) -> None:
    """Writes plans into a model directory, under the names that :func:`plan_files` finds."""
    for number, plan in enumerate(plans, start=1):
        plan.save(Path(directory) / plan_name(number))


def count_parameters(model: nn.Module) -> int:
    """Counts all parameters; a tensor that two modules share counts once."""
    return sum(p.numel() for p in model.parameters())


# Set by loading, not by the weights: two loads of one model may differ in them.
_VOLATILE_CONFIG = {
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "architectures",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def config_fingerprint(config: dict[str, JSONValue]) -> str:
    """The sha256 of a model config without the entries that loading sets."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def layer_groups(plans: list[Plan], dense_layers: int) -> list[tuple[int, ...]]:
    """What each layer of a compressed model stands for.

    Args:
        plans: What was done to the dense model, in order.
        dense_layers: How many layers the dense model has.

    Returns:
        For each layer that is left, the dense model's layers that it was made of: one, or a merged window.
    """
    groups: list[tuple[int, ...]] = [(layer,) for layer in range(dense_layers)]
    for plan in plans:
        kept: dict[int, tuple[int, ...]] = dict(enumerate(groups))
        for step in plan.steps:
            if isinstance(step, MergeLayers):
                top = min(step.high, len(groups) - 1)  # the plans may be another model's
                kept[step.host] = sum((kept.pop(layer, ()) for layer in range(step.low, top + 1)), ())
            elif isinstance(step, DropLayers):
                for layer in step.layers:
                    kept.pop(layer, None)
        groups = [kept[layer] for layer in sorted(kept)]
    return groups
