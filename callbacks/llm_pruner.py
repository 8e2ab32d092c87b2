"""LLM-Pruner: structural pruning of coupled structures by their gradients (arXiv 2305.11627)."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.base import CompressionCallback
from slm_pl.compression.allotment import (
    Counts,
    check_met,
    cost,
    equal_share,
    lowest,
    lowest_in_each,
    published_share,
    removed_parameters,
    same_width,
    wanted_parameters,
)
from slm_pl.compression.architecture import Group, accepts, architecture_of, num_layers
from slm_pl.compression.plan import JSONValue, KeepHidden, Plan, count_parameters
from slm_pl.compression.structures import Key, Structure, hidden_channel_parameters, masked, structures
from slm_pl.compression.target import check_target
from slm_pl.compression.unit_scores import (
    Grouping,
    HiddenScores,
    Scores,
    Taylor,
    UnitScores,
    differentiate,
    weigh,
)
from slm_pl.compression.width_plans import achieved, kept_steps, kept_trace, layer_range, rounded
from slm_pl.console import progress
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kept = dict[Key, list[int]]


class LLMPruner(CompressionCallback):
    """Removes the KV groups and MLP channels (or channels of the hidden state) that the loss depends on least.

    LLM-Pruner, https://arxiv.org/abs/2305.11627. Its three stages are *discovery* of the structures that have to go
    together, *estimation* of how important each of their units is, and *recovery*, the training that ``fit`` does.

    Exactly one of ``ratio`` and ``layer_ratio`` is given::

        trainer:
          callbacks:
            - class_path: callbacks.LLMPruner
              init_args: {ratio: 0.2}

    The published settings are ``layer_ratio: 0.25`` with the first four and the last two or three layers left alone
    (``attention_layers: [4, -2]``), which is about 20 % of a Llama-7B. Under grouped-query attention the authors'
    program scores one set of query heads and removes another; here the unit that is scored is the one that goes, unless
    ``as_published``.

    A trace row holds the scores of one structure's units as last estimated; null for those that were gone by then.

    Args:
        ratio: Remove this share of all parameters, exact to one unit (``uniform``: to one in each layer); in (0, 1).
        layer_ratio: Remove this share of the units of each pruned layer, rounded as the authors' program does; with
            ``global_ranking``, of the parameters of all units that may go; in (0, 1).
        importance: ``taylor``, by weights and gradients; ``magnitude``, Σ w²; ``random``, a draw by the calibration
            seed.
        taylor: With w the weight, g its gradient and a the mean squared gradient of single samples: ``param_first``
            |w g|, ``param_second`` w² a, ``param_mix`` |w g − w² a / 2|, each added up over a unit; ``vectorize`` the
            sum of w g over each row, then made positive.
        grouping: How the maps of a structure are joined: ``sum``, ``mean``, ``max``, or the ``last``, which writes.
        attention_layers: From and to which layer attention is pruned, half open, as Python slices; null for none.
        mlp_layers: The same for the MLPs.
        global_ranking: All units compete by importance per parameter; else every layer loses the same share.
        iterative_steps: Estimate again after each of so many equal parts.
        uniform: Prune all layers to one width, which stock model classes can load; the layer ranges do not apply. The
            config of a Llama or Gemma takes only a number of heads that divides the hidden size: attention loses the
            nearest such number, the MLPs the rest.
        scope: ``block``: attention and MLPs; ``channel``: the hidden state, in all layers and the embeddings.
        as_published: Score the heads of grouped-query attention as the authors' program does.
        plan_path: Apply this ``plan.json`` and do not search.

    Raises:
        UsageError: If not exactly one of the two controls is given, or arguments are out of range or exclude each
            other.
    """

    citation = """\
@inproceedings{ma2023llmpruner,
  title = {{LLM-Pruner}: On the Structural Pruning of Large Language Models},
  author = {Ma, Xinyin and Fang, Gongfan and Wang, Xinchao},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  note = {arXiv:2305.11627}
}"""

    computes_with_weights = True

    def __init__(
        self,
        ratio: float | None = None,
        layer_ratio: float | None = None,
        importance: Literal["taylor", "magnitude", "random"] = "taylor",
        taylor: Taylor = "param_first",
        grouping: Grouping = "sum",
        attention_layers: tuple[int, int | None] | None = (4, -2),
        mlp_layers: tuple[int, int | None] | None = (4, -2),
        global_ranking: bool = False,
        iterative_steps: int = 1,
        uniform: bool = False,
        scope: Literal["block", "channel"] = "block",
        as_published: bool = False,
        plan_path: str | None = None,
    ) -> None:
        super().__init__(plan_path)
        check_target("LLMPruner", plan_path, {"ratio": ratio, "layer_ratio": layer_ratio})
        for name, value, allowed in (
            ("importance", importance, ("taylor", "magnitude", "random")),
            ("taylor", taylor, ("param_first", "param_second", "param_mix", "vectorize")),
            ("grouping", grouping, ("sum", "mean", "max", "last")),
            ("scope", scope, ("block", "channel")),
        ):
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}; allowed are {', '.join(allowed)}.")
        if importance != "taylor" and taylor != "param_first":
            raise UsageError(f"taylor is {taylor}, but importance is {importance}. Leave taylor out.")
        if importance == "random" and (grouping != "sum" or as_published):
            raise UsageError("importance random looks at no weights. Leave grouping and as_published out.")
        if iterative_steps < 1:
            raise UsageError(f"iterative_steps is {iterative_steps}; give at least 1.")
        if uniform and global_ranking:
            raise UsageError("uniform gives all layers one width, global_ranking each its own; give one of them.")
        if scope == "channel" and (
            uniform or global_ranking or iterative_steps > 1 or as_published or grouping == "last"
        ):
            raise UsageError(
                "scope channel prunes one structure once: leave out uniform, global_ranking, iterative_steps, "
                "as_published and grouping last."
            )
        for name, bounds in (("attention_layers", attention_layers), ("mlp_layers", mlp_layers)):
            if (uniform or scope == "channel") and bounds is not None and tuple(bounds) not in ((4, -2), (0, None)):
                raise UsageError(
                    f"{name} is {list(bounds)}, but uniform and scope channel prune all layers. Leave {name} out"
                    + (", or set it to null to leave them alone." if uniform else ".")
                )
        if scope == "block" and attention_layers is None and mlp_layers is None:
            raise UsageError("attention_layers and mlp_layers are both null: nothing is pruned. Give one of them.")
        self.ratio = ratio
        self.layer_ratio = layer_ratio
        self.importance = importance
        self.taylor = taylor
        self.grouping = grouping
        self.attention_layers = None if attention_layers is None else list(attention_layers)
        self.mlp_layers = None if mlp_layers is None else list(mlp_layers)
        self.global_ranking = global_ranking
        self.iterative_steps = iterative_steps
        self.uniform = uniform
        self.scope = scope
        self.as_published = as_published

    @property
    def uses_calibration(self) -> bool:
        """Only gradients need text."""
        return self.importance == "taylor"

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Discovers the structures, estimates their units and takes the least important; see the class."""
        outcome: dict[str, JSONValue] = {"score": self._score_name()}
        if self.scope == "channel":
            return self._plan_hidden(model, calibration, outcome)
        units = self._discover(model)
        counts, wanted = self._allot(model, units)
        kept: Kept = {key: list(range(structure.units)) for key, structure in units.items()}
        for step in range(1, self.iterative_steps + 1):
            with masked(model, units, kept):
                scores = self._estimate(model, calibration, units, step)
            last = kept
            if self.global_ranking:
                each = {key: values / units[key].unit_parameters for key, values in scores.items()}
                target = round(wanted * step / self.iterative_steps) - removed_parameters(units, kept)
                kept = lowest(units, each, target, kept=kept)
            else:
                gone = {key: count * step // self.iterative_steps for key, count in counts.items()}
                now = {key: count - (units[key].units - len(kept[key])) for key, count in gone.items()}
                kept = lowest_in_each(scores, now, kept)
        if self.importance == "random":
            outcome["seed"] = calibration.text.seed
        if self.global_ranking:
            check_met(units, kept, wanted)
        outcome |= achieved(model, removed_parameters(units, kept), self.ratio)
        steps = kept_steps(units, kept)
        return self.make_plan(model, calibration, [*steps], kept_trace(units, scores, kept, last), outcome)

    def _score_name(self) -> str:
        how = {"taylor": f"Taylor {self.taylor}", "magnitude": "sum of w²", "random": "a random draw"}[self.importance]
        return how if self.importance == "random" else f"{how}, {self.grouping} over the maps"

    def _discover(self, model: "PreTrainedModel") -> dict[Key, Structure]:
        """Discovery: the structures that may lose units."""
        if self.uniform and getattr(model.config, "layer_widths", None) is not None:
            raise UsageError(
                "uniform is true, but the layers of this model differ in width already, or carry biases that its stock "
                "class has not. Set uniform: false, or start from a model whose layers are equal."
            )
        architecture, ranges = architecture_of(model), {"attention": self.attention_layers, "mlp": self.mlp_layers}
        units: dict[Key, Structure] = {}
        for group, bounds in ranges.items():
            if bounds is None:
                continue
            found: Group = "attention" if group == "attention" else "mlp"
            can_say = architecture.own_head_dim if group == "attention" else architecture.intermediate is not None
            if self.uniform and not can_say:
                rank_zero_warn(
                    f"LLMPruner: {group} keeps its width: the config of a {model.config.model_type} model cannot say "
                    "another one that all layers share. Set uniform: false to prune it."
                )
                continue
            span = range(num_layers(model)) if self.uniform else layer_range(model, bounds, f"{group}_layers")
            there = structures(model, span, [found])
            if not there:
                reason = architecture.fixed_heads if group == "attention" else "its layers have experts"
                rank_zero_warn(f"LLMPruner: {group} of this model keeps its width: {reason or 'it has no units left'}.")
            units |= there
        if not units:
            raise UsageError(
                f"Nothing of this {model.config.model_type} model can be pruned with attention_layers "
                f"{self.attention_layers}, mlp_layers {self.mlp_layers} and uniform {self.uniform}."
            )
        return dict(sorted(units.items()))

    def _allot(self, model: "PreTrainedModel", units: dict[Key, Structure]) -> tuple[Counts, int]:
        """How many units of each structure go, and how many parameters that is."""
        if self.layer_ratio is None:
            assert self.ratio is not None
            wanted = wanted_parameters(model, self.ratio, units)
            if not self.uniform:
                return equal_share(units, wanted), wanted
            counts = same_width(units, wanted, functools.partial(_takes, model, units))
            step = min(sum(s.unit_parameters for k, s in units.items() if k[1] == group) for _, group in units)
            missed = cost(units, counts) - wanted
            if not any(counts.values()) or 2 * abs(missed) > step:
                share = cost(units, counts) / count_parameters(model)
                raise UsageError(
                    f"ratio {self.ratio} cannot be met with one width for all layers: the nearest is {share:.4f}. Give "
                    "that, let attention and MLPs both be pruned, or set uniform: false."
                )
            return counts, wanted
        if self.global_ranking:
            return {}, round(self.layer_ratio * cost(units, {key: s.units for key, s in units.items()}))
        counts = published_share(units, self.layer_ratio)
        for group in ("attention", "mlp"):
            narrow = [key for key in counts if key[1] == group]
            if narrow and not any(counts[key] for key in narrow):
                rank_zero_warn(
                    f"LLMPruner: layer_ratio {self.layer_ratio} of {units[narrow[0]].units} {group} units is less than "
                    f"a whole one, so {group} keeps its width. The rest is pruned."
                )
        if not any(counts.values()) or any(count >= units[key].units for key, count in counts.items()):
            raise UsageError(
                f"layer_ratio {self.layer_ratio} removes "
                + ("no whole unit of any layer." if not any(counts.values()) else "all units of a layer.")
                + f" The layers have {sorted({s.units for s in units.values()})} units."
            )
        for (_, group), count in counts.items() if self.uniform else ():
            left = next(structure.units for key, structure in units.items() if key[1] == group) - count
            if not _takes(model, units, group, left):
                raise UsageError(
                    f"layer_ratio {self.layer_ratio} leaves {left} KV groups in every layer, which the config of "
                    f"a {model.config.model_type} model does not take: its heads have to divide the hidden "
                    "size. Give ratio, which finds one that it takes, or set uniform: false."
                )
        return counts, cost(units, counts)

    def _estimate(
        self, model: "PreTrainedModel", calibration: CalibrationSet, units: dict[Key, Structure], step: int
    ) -> Scores:
        """Estimation: how important every unit is."""
        if self.importance == "random":
            generator = torch.Generator().manual_seed(calibration.text.seed + step)
            return {key: torch.rand(s.units, generator=generator, dtype=torch.float64) for key, s in units.items()}
        found = UnitScores(units, self.grouping, self.as_published)
        self._visit(model, calibration, found, sorted({layer for layer, _ in units}))
        return found.scores()

    def _visit(
        self,
        model: "PreTrainedModel",
        calibration: CalibrationSet,
        found: UnitScores | HiddenScores,
        layers: Sequence[int],
    ) -> None:
        steps = len(layers) if self.importance == "magnitude" else num_layers(model)
        with progress("Estimating importance", steps) as advance:
            if self.importance == "magnitude":
                weigh(model, layers, found.add, advance)
            else:
                differentiate(model, list(calibration), self.taylor, found.add, advance)

    def _plan_hidden(
        self, model: "PreTrainedModel", calibration: CalibrationSet, outcome: dict[str, JSONValue]
    ) -> Plan:
        """The same for the hidden state: one structure that goes through the whole model."""
        channels, each, step = hidden_channel_parameters(model)
        if self.layer_ratio is not None:
            gone = channels - int(channels * (1 - self.layer_ratio))
        else:
            assert self.ratio is not None
            gone = round(self.ratio * count_parameters(model) / each)
        gone = round(gone / step) * step
        if not 0 < gone < channels:
            name = "ratio" if self.layer_ratio is None else "layer_ratio"
            raise UsageError(
                f"{name} {self.ratio or self.layer_ratio} means {gone} of {channels} channels of the "
                f"hidden state; 1 to {channels - 1} can be removed" + (f", {step} at a time." if step > 1 else ".")
            )
        if self.importance == "random":
            outcome["seed"] = calibration.text.seed
            generator = torch.Generator().manual_seed(calibration.text.seed)
            scores: Tensor = torch.rand(channels, generator=generator, dtype=torch.float64)
        else:
            found = HiddenScores(model, self.grouping)
            self._visit(model, calibration, found, range(num_layers(model)))
            scores = found.scores()
        kept = tuple(sorted(scores.argsort(stable=True)[gone:].tolist()))
        outcome |= achieved(model, gone * each, self.ratio)
        row: dict[str, JSONValue] = {"group": "hidden", "units": channels, "kept": len(kept), "scores": rounded(scores)}
        return self.make_plan(model, calibration, [KeepHidden(kept)], [row], outcome)


def _takes(model: "PreTrainedModel", units: dict[Key, Structure], group: Group, left: int) -> bool:
    """Whether the config can say that every layer has so many units of a group."""
    if group == "mlp":
        return True
    found = next(structure for key, structure in units.items() if key[1] == group)
    return accepts(model, heads=left * (found.output.size // found.head_dim))
