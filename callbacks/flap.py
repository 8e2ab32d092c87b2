"""FLAP: removing the channels that fluctuate least, and a bias in their place (arXiv 2312.11983)."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from callbacks.base import CompressionCallback
from slm_pl.compression.allotment import (
    check_met,
    cost,
    equal_share,
    lowest,
    lowest_in_each,
    removed_parameters,
    wanted_parameters,
)
from slm_pl.compression.architecture import GROUPS, decoder_layers, hidden_size, num_layers
from slm_pl.compression.calibration import distributed
from slm_pl.compression.fluctuation import ChannelStatistics, input_statistics, weighted_norm
from slm_pl.compression.plan import JSONValue, Plan
from slm_pl.compression.structures import Key, Structure, structures, weight_of
from slm_pl.compression.target import check_target
from slm_pl.compression.unit_scores import Scores
from slm_pl.compression.width_plans import achieved, kept_steps, kept_trace
from slm_pl.console import progress
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kept = dict[Key, list[int]]
Units = dict[Key, Structure]


class FLAP(CompressionCallback):
    """Removes the attention units and MLP channels that vary least, and adds what they gave on average as a bias.

    FLAP, https://arxiv.org/abs/2312.11983. A channel c that goes into an output map with the weight W (o_proj,
    down_proj) is worth, over all tokens of the calibration text,

    * ``WIFV``: Var(x_c) · ‖W_c‖² (weighted input feature variance);
    * ``IFV``: Var(x_c);
    * ``WIFN``: mean |W_c| · ‖x_c‖ (weighted input feature norm).

    A head or KV group is worth the mean over its channels. The model is run once; nothing is trained::

        trainer:
          callbacks:
            - class_path: callbacks.FLAP
              init_args: {ratio: 0.2}

    Which units compete with each other is ``structure``:

    * ``AL-AM``: all of them, after each layer's metric was standardised (adaptive over layers and modules);
    * ``AL-MM``: all heads, and all MLP channels, by themselves (adaptive over layers, manual over modules);
    * ``UL-UM``: those of one layer's attention or MLP; every layer loses the same share of both;
    * ``UL-MM``: the same, with the share of attention given.

    Args:
        ratio: Remove this share of all parameters, exact to one unit (the bias that is added counts); in (0, 1). With
            ``as_published``, the share of the decoder layers' weights, as the authors' program counts them.
        metric: What a channel is worth.
        structure: Which units compete.
        bias_compensation: Add W_c · mean(x_c), over the removed channels, as a bias to the output map.
        attention_ratio: Of the ``MM`` structures: the share of attention's units that goes; the MLPs lose the rest. If
            not given, both lose the same share.
        allow_empty: Let a layer lose all its attention units or MLP channels; it is skipped then.
        as_published: Compute as the authors' program does: the fluctuation without its first sample and not divided by
            the tokens, attention's metric squared, a head worth as many channels as its parameters, rounded down, and
            means in half precision. For ``AL-AM`` and ``UL-UM``, in one process.
        plan_path: Apply this ``plan.json`` and do not search.

    Raises:
        UsageError: If ``ratio`` is missing, or arguments are out of range or exclude each other.
    """

    citation = """\
@inproceedings{an2024flap,
  title = {Fluctuation-based Adaptive Structured Pruning for Large Language Models},
  author = {An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year = {2024},
  note = {arXiv:2312.11983}
}"""

    computes_with_weights = True

    def __init__(
        self,
        ratio: float | None = None,
        metric: Literal["WIFV", "WIFN", "IFV"] = "WIFV",
        structure: Literal["AL-AM", "UL-UM", "AL-MM", "UL-MM"] = "AL-AM",
        bias_compensation: bool = True,
        attention_ratio: float | None = None,
        allow_empty: bool = False,
        as_published: bool = False,
        plan_path: str | None = None,
    ) -> None:
        super().__init__(plan_path)
        check_target("FLAP", plan_path, {"ratio": ratio})
        if metric not in ("WIFV", "WIFN", "IFV"):
            raise UsageError(f"metric is {metric!r}; allowed are WIFV, WIFN and IFV.")
        if structure not in ("AL-AM", "UL-UM", "AL-MM", "UL-MM"):
            raise UsageError(f"structure is {structure!r}; allowed are AL-AM, UL-UM, AL-MM and UL-MM.")
        if attention_ratio is not None and (not structure.endswith("MM") or not 0 <= attention_ratio < 1):
            raise UsageError(
                f"attention_ratio is {attention_ratio} with structure {structure}; it is a share in [0, 1) for "
                "AL-MM and UL-MM."
            )
        if as_published and structure.endswith("MM"):
            raise UsageError(f"as_published reproduces AL-AM and UL-UM; structure is {structure}.")
        self.ratio = ratio
        self.metric = metric
        self.structure = structure
        self.bias_compensation = bias_compensation
        self.attention_ratio = attention_ratio
        self.allow_empty = allow_empty
        self.as_published = as_published

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Measures the channels in one pass and takes the least; see the class."""
        units = structures(model, range(num_layers(model)))
        if not units:
            raise UsageError(f"No {model.config.model_type} layer of this model has units that FLAP can remove.")
        if self.as_published and distributed():
            raise UsageError("as_published depends on the order of the samples. Run it in one process.")
        batches = list(calibration)
        with progress("Measuring fluctuations", len(batches)) as advance:
            found = input_statistics(model, batches, units, self.as_published, advance)
        scores = {key: self._unit_metric(model, units[key], key, found[key]) for key in units}
        kept = self._published(units, scores) if self.as_published else self._choose(model, units, scores)
        tensors = self._biases(model, units, kept, found) if self.bias_compensation else {}
        names = {key: name for key in units if (name := _bias_name(key)) in tensors}
        removed = removed_parameters(units, kept) - self._bias_parameters(model, units, kept)
        outcome: dict[str, JSONValue] = {
            "score": f"{self.metric}, {'standardised' if self.structure.startswith('AL') else 'as measured'}",
            **achieved(model, removed, None if self.as_published else self.ratio),
        }
        plan = self.make_plan(
            model,
            calibration,
            [*kept_steps(units, kept, names)],
            kept_trace(units, scores, kept),
            outcome,
        )
        return plan.with_tensors(tensors) if tensors else plan

    def _unit_metric(self, model: "PreTrainedModel", own: Structure, key: Key, found: ChannelStatistics) -> Tensor:
        """What each unit is worth, ``[units]``."""
        weight = weight_of(decoder_layers(model)[key[0]], own.output.path).detach()
        metric = self._channel_metric(weight, found)
        if self.as_published and key[1] == "attention":
            metric = metric.square()
        if self.structure.startswith("AL"):
            spread = metric.std() if len(metric) > 1 else metric.new_zeros(())
            # Where all channels are worth the same, none stands out.
            metric = (metric - metric.mean()) / spread if spread > 0 else torch.zeros_like(metric)
        units = own.output.of_units(metric, own.units)
        # The authors' program adds a head's channels up where it compares within a layer; that changes no order.
        return units.mean(1).cpu().double()

    def _channel_metric(self, weight: Tensor, found: ChannelStatistics) -> Tensor:
        """What each channel is worth, ``[channels]``."""
        if self.metric == "WIFN":
            return weighted_norm(weight, found)
        fluctuation = found.variance if found.published is None else found.published.fluctuation
        if self.metric == "IFV":
            return fluctuation
        return fluctuation * weight.to(fluctuation.dtype).square().sum(0)

    def _choose(self, model: "PreTrainedModel", units: Units, scores: Scores) -> Kept:
        """The units that stay, so that the model loses the share that was asked for."""
        assert self.ratio is not None
        least = 0 if self.allow_empty else 1
        wanted = wanted_parameters(model, self.ratio, units, least)
        kept: Kept = {key: [] for key in units}
        for _ in range(8):
            # Only a structure that loses units gets a bias, and which ones do depends on how many have to go.
            last, kept = kept, self._take(units, scores, wanted + self._bias_parameters(model, units, kept), least)
            if [key for key in kept if len(kept[key]) < units[key].units] == [
                key for key in last if len(last[key]) < units[key].units
            ]:
                break
        check_met(units, kept, wanted + self._bias_parameters(model, units, kept))
        return kept

    def _take(self, units: Units, scores: Scores, wanted: int, least: int) -> Kept:
        """The units that stay after those that are worth least, of the ones that compete, went."""
        adaptive = self.structure.startswith("AL")
        attention = {key: own for key, own in units.items() if key[1] == "attention"}
        rest = {key: own for key, own in units.items() if key[1] == "mlp"}
        share = self.attention_ratio
        if share is not None and not (attention and rest):
            raise UsageError(
                f"attention_ratio is {share}, but of this model only {'attention' if attention else 'MLPs'} can lose "
                "units. Leave it out."
            )
        most_share = min(((own.units - least) / own.units for own in attention.values()), default=0.0)
        if share is not None and share > most_share:
            raise UsageError(
                f"attention_ratio is {share}, but without emptying a layer's attention at most {most_share:.2g} of its "
                "units can go. Give less, or allow_empty: true."
            )
        apart = self.structure.endswith("MM") and attention and rest
        if not apart or (share is None and not adaptive):
            if adaptive:
                return lowest(units, scores, wanted, least)
            return lowest_in_each(scores, equal_share(units, wanted, least))
        everything = cost(attention, {key: own.units for key, own in attention.items()})
        if share is None:
            # The same of both; whole heads, and no more than that, since the MLPs can make up for less only.
            largest = max(own.unit_parameters for own in attention.values())
            both = everything + cost(rest, {key: own.units for key, own in rest.items()})
            first = int(wanted / both * everything) // largest * largest
        else:
            first = round(share * everything)
        if adaptive:
            kept = lowest(attention, scores, first, least)
        else:
            assert share is not None
            counts = {key: min(round(share * own.units), own.units - least) for key, own in attention.items()}
            kept = lowest_in_each({key: scores[key] for key in attention}, counts)
        remaining = wanted - removed_parameters(attention, kept)
        most = cost(rest, {key: own.units - least for key, own in rest.items()})
        if not 0 <= remaining <= most:
            raise UsageError(
                f"ratio {self.ratio} with attention_ratio {share} leaves {remaining:,} parameters for the MLPs to "
                f"lose, which can lose 0 to {most:,}. Give another of both."
            )
        if adaptive:
            return kept | lowest(rest, scores, remaining, least)
        return kept | lowest_in_each({key: scores[key] for key in rest}, equal_share(rest, remaining, least))

    def _bias_parameters(self, model: "PreTrainedModel", units: Units, kept: Kept) -> int:
        """Parameters of the biases that are added."""
        if not self.bias_compensation:
            return 0
        narrow = [key for key in units if len(kept[key]) < units[key].units]
        layers = decoder_layers(model)
        without = [key for key in narrow if layers[key[0]].get_submodule(units[key].output.path).bias is None]
        return len(without) * hidden_size(model)

    def _published(self, units: Units, scores: Scores) -> Kept:
        """The threshold of the authors' program."""
        assert self.ratio is not None
        kept: Kept = {}
        if self.structure == "UL-UM":
            kept = lowest_in_each(scores, {key: int(self.ratio * own.units) for key, own in units.items()})
        else:
            channel = min(own.unit_parameters for own in units.values())
            keys = sorted(units, key=lambda key: (GROUPS.index(key[1]), key[0]))
            metric = torch.cat([scores[key] for key in keys]).float()
            # Whole numbers, because that program writes 512 / 3 into a tensor of integers.
            weights = torch.cat([torch.full((units[k].units,), units[k].unit_parameters // channel) for k in keys])
            ordered, order = metric.sort(descending=True, stable=True)
            so_far = weights[order].cumsum(0).float()
            threshold = ordered[(so_far - weights.sum() * (1 - self.ratio)).abs().argmin()]
            for key in keys:
                kept[key] = (scores[key].float() > threshold).nonzero().flatten().tolist()
        if not self.allow_empty:
            kept = {key: left or [int(scores[key].argmax())] for key, left in kept.items()}
        return kept

    def _biases(
        self, model: "PreTrainedModel", units: Units, kept: Kept, found: dict[Key, ChannelStatistics]
    ) -> dict[str, Tensor]:
        """Σ over the removed channels of W_c · mean(x_c), by name; ``[hidden]``, float32, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for key, own in units.items():
            if len(kept[key]) == own.units:
                continue
            weight = weight_of(decoder_layers(model)[key[0]], own.output.path).detach().double()
            statistics = found[key]
            mean = statistics.mean if statistics.published is None else statistics.published.mean.half()
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[own.kept_entries(kept[key])[own.output.path, own.output.axis]] = False
            gone = gone.to(weight.device)
            tensors[_bias_name(key)] = (weight[:, gone] @ mean.double()[gone]).float().cpu()
        return tensors


def _bias_name(key: Key) -> str:
    return f"layers.{key[0]}.{key[1]}.bias"
