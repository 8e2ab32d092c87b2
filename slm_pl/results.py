"""What was measured of a model, as ``results.json``.

One record per evaluated model: its identity, the environment, every figure with its protocol. A figure that could not
be measured is absent, and ``missing`` holds the reason under the figure's place, for example
``efficiency[0].peak_memory_bytes``; it is never zero and never a non-finite number. A text that a hook could not
measure has the key ``perplexity <corpus> @ <sequence_length>`` or ``drift <corpus> @ <sequence_length>``, a whole part
that is absent its name, ``drift``. What NVML did not tell at any point of a grid is ``gpu_utilisation``, ``gpu_energy``
or ``gpu_memory``.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar, cast

import torch

import slm_pl
from slm_pl.documents import parse_json
from slm_pl.errors import UsageError
from slm_pl.evaluation.drift import DriftResult
from slm_pl.evaluation.efficiency.record import EfficiencyResult
from slm_pl.evaluation.perplexity import PerplexityResult
from slm_pl.evaluation.zero_shot import ZeroShotResult
from slm_pl.files import write_text
from slm_pl.sealing import broken_seal, is_whole, sealed

SCHEMA_VERSION = 1
_PACKAGES = ("torch", "transformers", "lightning", "peft", "lm_eval")

_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was measured.

    Args:
        label: Short name, such as ``dense`` or ``pruned``.
        source: What it was loaded from: a hub id, a directory or a file.
        base: The dense model that it was made from; ``source`` itself for a dense model.
        num_layers: Decoder layers.
        num_parameters: All parameters, shared ones once.
        plan_sha256: Fingerprint of the compression plan; None for a dense model.
        requested_ratio: Share of all parameters that the only plan was asked to remove; None if it was asked for
            something else.
        quantization: What its weights are quantised to; None if they are not.
    """

    label: str
    source: str
    base: str
    num_layers: int
    num_parameters: int
    plan_sha256: str | None
    requested_ratio: float | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class Environment:
    """What it was measured on; speed and memory compare only within the same.

    Args:
        packages: Versions by name, Python's included.
        device: Such as ``cpu`` or ``cuda:0``.
        device_name: The processor's name.
        threads: Threads of one torch operation on the CPU.
        dtype: Of the weights, such as ``float32``.
        date: UTC, ISO 8601.
        git: Commit of the working directory, or None outside of a repository.
        platform: Operating system.
        embedded_sha256: Hash of the embedded text and questions, which come from the running Python.
    """

    packages: dict[str, str]
    device: str
    device_name: str
    threads: int
    dtype: str
    date: str
    git: str | None
    platform: str
    embedded_sha256: str | None = None

    @classmethod
    def collect(cls, device: torch.device | str, dtype: torch.dtype | str) -> "Environment":
        """Describes this process.

        Args:
            device: Where the model is.
            dtype: Of its weights.
        """
        from slm_pl.data.embedded import fingerprint

        device = torch.device(device)
        packages = {"python": platform.python_version(), "slm_pl": slm_pl.__version__}
        for name in _PACKAGES:
            try:
                packages[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return cls(
            packages=packages,
            device=str(device),
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            threads=torch.get_num_threads(),
            dtype=str(dtype).removeprefix("torch."),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            git=_git_commit(),
            platform=platform.platform(),
            embedded_sha256=fingerprint(),
        )


@dataclass
class Results:
    """Everything measured of one model; each test hook adds its part.

    Args:
        model: Which model.
        environment: Measured where.
        perplexity: One entry per corpus and protocol.
        zero_shot: Accuracy on multiple-choice tasks.
        drift: Distance from the dense model, one entry per text.
        efficiency: One entry per generation setting.
        missing: Reason of each figure that is absent, by its place in the record or by name.
        schema_version: Version of the names in ``results.json``.
    """

    model: ModelIdentity
    environment: Environment
    perplexity: list[PerplexityResult] = field(default_factory=list)
    zero_shot: ZeroShotResult | None = None
    drift: list[DriftResult] = field(default_factory=list)
    efficiency: list[EfficiencyResult] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, object]:
        """The record as JSON knows it: what is missing or not finite is left out, with its reason in ``missing``."""
        missing = dict(self.missing)
        record: dict[str, object] = {"schema_version": self.schema_version}
        for name in ("model", "environment", "perplexity", "zero_shot", "drift", "efficiency"):
            value = getattr(self, name)
            if value is not None and (value or name != "drift"):
                record[name] = _encode(value, name, missing)
        record["missing"] = missing
        return record

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``results.json``, whole or not at all.

        Raises:
            UsageError: If the directory cannot be written.
        """
        write_text(path, json.dumps(sealed(self.to_dict()), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Results":
        """Reads ``results.json``; names that this version does not know are ignored.

        Raises:
            UsageError: If the file cannot be read, is not JSON, has another schema version, is not as it was written,
                or lacks a name.
        """
        try:
            data = parse_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"Cannot read the results {str(path)!r}: {error.strerror or error}. Give the path of a results.json "
                "that `main.py test` wrote."
            ) from error
        except ValueError as error:
            raise UsageError(
                f"{str(path)!r} is no JSON that can be read ({error}). Give the path of a results.json that "
                "`main.py test` wrote."
            ) from error
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            got = repr(data.get("schema_version", "none")) if isinstance(data, dict) else f"a {type(data).__name__}"
            raise UsageError(
                f"{str(path)!r} has schema_version {got}; this program reads {SCHEMA_VERSION}. Run `main.py test` "
                "again, or use the program version that wrote it."
            )
        if not is_whole(data):
            raise UsageError(broken_seal(path))
        missing = data.get("missing", {})
        missing = missing if isinstance(missing, dict) else {}
        try:
            return decode(cls, data, missing)
        except FormError as error:
            raise UsageError(
                f"{str(path)!r} is not a results.json of this program: {error}. Run `main.py test` again."
            ) from error


class FormError(Exception):
    """A record's value is absent or of the wrong type."""


def _encode(value: object, place: str, missing: dict[str, str]) -> object:
    """Turns dataclasses into JSON values, and moves what is not finite or has a reason of its own to ``missing``."""
    items: list[tuple[str, object]]
    if dataclasses.is_dataclass(value):
        items = [(one.name, getattr(value, one.name)) for one in dataclasses.fields(value)]
        own = getattr(value, "missing", {})
        missing.update({f"{place}.{name}": reason for name, reason in own.items()})
        items = [(name, part) for name, part in items if name != "missing"]
    elif isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        return [_encode(part, f"{place}[{index}]", missing) for index, part in enumerate(value)]
    else:
        return value
    encoded: dict[str, object] = {}
    for name, part in items:
        inner = f"{place}.{name}"
        if isinstance(part, float) and not math.isfinite(part):
            missing.setdefault(inner, f"not a finite number ({part})")
        elif part is not None or inner not in missing:
            encoded[name] = _encode(part, inner, missing)
    return encoded


def decode(form: type[_T], value: object, missing: Mapping[str, str] | None = None) -> _T:
    """Reads JSON values as a dataclass.

    Args:
        form: The dataclass.
        value: The JSON object.
        missing: Reasons of absent numbers by their place; these are read as not a number.

    Raises:
        FormError: If a value is absent or of the wrong type.
    """
    return cast(_T, _decode_any(form, value, "", missing or {}))


def _decode_any(form: object, value: object, place: str, missing: Mapping[str, str]) -> object:
    where = place or "the record"
    origin, arguments = typing.get_origin(form), typing.get_args(form)
    if dataclasses.is_dataclass(form) and isinstance(form, type):
        if not isinstance(value, dict):
            raise FormError(f"{where} is {_kind(value)}, not an object")
        hints = _hints(form)
        parts: dict[str, object] = {}
        for one in dataclasses.fields(form):
            inner = f"{place}.{one.name}" if place else one.name
            if one.name in value:
                parts[one.name] = _decode_any(hints[one.name], value[one.name], inner, missing)
            elif inner in missing and hints[one.name] is float:
                parts[one.name] = math.nan
            elif type(None) in typing.get_args(hints[one.name]):
                parts[one.name] = None
            elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                raise FormError(f"{inner} is missing")
        try:
            return form(**parts)
        except ValueError as error:  # which its __post_init__ raises
            raise FormError(f"{where}: {error}") from None
    if origin is list:
        if not isinstance(value, list):
            raise FormError(f"{where} is {_kind(value)}, not a list")
        return [_decode_any(arguments[0], part, f"{place}[{index}]", missing) for index, part in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise FormError(f"{where} is {_kind(value)}, not an object")
        return {name: _decode_any(arguments[1], part, f"{place}.{name}", missing) for name, part in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [one for one in arguments if one is not type(None)]
        if len(choices) == 1:
            return _decode_any(choices[0], value, place, missing)
        if type(value) in choices:
            return value
    elif form is float and type(value) in (int, float):
        try:
            return float(cast(float, value))
        except OverflowError:
            raise FormError(f"{where} is larger than a number can be") from None
    elif type(value) is form:
        return value
    raise FormError(f"{where} is {_kind(value)}, not {getattr(form, '__name__', form)}")


@functools.cache
def _hints(form: type) -> dict[str, object]:
    return typing.get_type_hints(form)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"{value!r}")


def _processor() -> str:
    with_names = Path("/proc/cpuinfo")
    if with_names.is_file():
        for line in with_names.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            [git, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
