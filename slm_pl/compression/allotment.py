"""How many units each structure loses, so that a model loses the share of its parameters that was asked for."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from slm_pl.compression.architecture import Group
from slm_pl.compression.plan import count_parameters
from slm_pl.compression.structures import Key, Structure
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Units = Mapping[Key, Structure]
Counts = dict[Key, int]
"""By structure, how many of its units go."""


def wanted_parameters(model: "PreTrainedModel", ratio: float, units: Units, least: int = 1) -> int:
    """How many parameters are to go.

    Args:
        model: The model.
        ratio: This share of all its parameters.
        units: The structures that may lose units.
        least: Units that stay in each of them.

    Raises:
        UsageError: If that is less than half a unit, or more than these structures have.
    """
    total = count_parameters(model)
    wanted = round(ratio * total)
    smallest = min(structure.unit_parameters for structure in units.values())
    most = sum((structure.units - least) * structure.unit_parameters for structure in units.values())
    if 2 * wanted < smallest or wanted > most + smallest / 2:
        raise UsageError(
            f"ratio {ratio} means {wanted:,} of {total:,} parameters; the attention and MLP units that may go have "
            f"{most:,} (ratio {smallest / total:.2g} to {most / total:.3f})"
            + (", with one of each staying." if least else ".")
            + " Give another ratio, or let more layers be pruned."
        )
    return wanted


def removed_parameters(units: Units, kept: Mapping[Key, Sequence[int]]) -> int:
    """Parameters of the units that do not stay."""
    return cost(units, {key: structure.units - len(kept[key]) for key, structure in units.items()})


def check_met(units: Units, kept: Mapping[Key, list[int]], wanted: int) -> None:
    """Refuses a choice that misses its target by more than a unit, because structures keep what they may not lose.

    Args:
        units: The structures.
        kept: The units that stay.
        wanted: Parameters that were to go.

    Raises:
        UsageError: If it does.
    """
    removed = removed_parameters(units, kept)
    if abs(removed - wanted) > max(structure.unit_parameters for structure in units.values()):
        raise UsageError(
            f"{wanted:,} parameters are to go, but without emptying a layer's attention or MLP these settings remove "
            f"{removed:,}. Ask for less, or let more layers be pruned."
        )


def cost(units: Units, counts: Mapping[Key, int]) -> int:
    """Parameters of so many units."""
    return sum(units[key].unit_parameters * count for key, count in counts.items())


def equal_share(units: Units, wanted: int, least: int = 1) -> Counts:
    """Takes the same share of every structure's units, exact to one unit in all.

    Attention has few units: of them the share is rounded. MLP channels make up the difference, spread evenly.

    Args:
        units: The structures.
        wanted: Parameters that are to go.
        least: Units that stay in each structure.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if cost(units, _share(units, middle, least)) <= wanted:
            low = middle
        else:
            high = middle
    counts = _share(units, low, least)
    for group in ("mlp", "attention"):
        _fill({key: s for key, s in units.items() if key[1] == group}, counts, wanted - cost(units, counts), least)
    return counts


def _share(units: Units, share: float, least: int) -> Counts:
    # Half a unit more than the whole number below, so that few units are shared out fairly; channels are filled up.
    return {
        key: min(int(share * s.units + (0.5 if key[1] == "attention" else 0)), s.units - least)
        for key, s in units.items()
    }


def _fill(units: Units, counts: Counts, remaining: int, least: int) -> None:
    """Takes one unit more where the share that went is least, lowest layer first, until the remainder is too small."""
    queue = [((counts[key] + 1) / s.units, key) for key, s in units.items() if counts[key] < s.units - least]
    heapq.heapify(queue)
    while queue:
        share, key = heapq.heappop(queue)
        structure = units[key]
        if 2 * remaining < structure.unit_parameters:
            continue
        counts[key] += 1
        remaining -= structure.unit_parameters
        if counts[key] < structure.units - least:
            heapq.heappush(queue, (share + 1 / structure.units, key))


def same_width(
    units: Units,
    wanted: int,
    takes: Callable[[Group, int], bool] = lambda group, units: True,
    least: int = 1,
) -> Counts:
    """Takes as many units of every layer, exact to one MLP channel in each.

    Args:
        units: The structures; all of a group have as many units.
        wanted: Parameters that are to go.
        takes: Whether the config can say that a group has so many units.
        least: Units that stay in each structure.

    Raises:
        UsageError: If the structures differ in width, so that they cannot end with one.
    """
    groups: dict[Group, list[Structure]] = {}
    for key, structure in units.items():
        groups.setdefault(key[1], []).append(structure)
    possible: dict[Group, list[int]] = {}
    for group, found in groups.items():
        if len({structure.units for structure in found}) > 1:
            raise UsageError(
                f"uniform is true, but the layers of this model differ in width already ({group}: "
                f"{min(s.units for s in found)} to {max(s.units for s in found)} units). Set uniform: false, or start "
                "from a model whose layers are equal."
            )
        there = found[0].units
        possible[group] = [count for count in range(there - least + 1) if not count or takes(group, there - count)]

    sizes = {group: sum(structure.unit_parameters for structure in found) for group, found in groups.items()}

    def nearest(group: Group, parameters: int) -> int:
        return min(possible[group], key=lambda count: abs(parameters - count * sizes[group]))

    choices: list[dict[Group, int]] = [{group: nearest(group, wanted)} for group in groups]
    if len(groups) == 2:
        heads = possible["attention"]
        choices = [{"attention": count, "mlp": nearest("mlp", wanted - count * sizes["attention"])} for count in heads]

    def miss(counts: dict[Group, int]) -> tuple[float, float]:
        """By how much it misses, beyond half of the smallest step, and how unequal the shares of both groups are."""
        off = abs(wanted - sum(count * sizes[group] for group, count in counts.items()))
        shares = [count / groups[group][0].units for group, count in counts.items()]
        return max(0.0, off - min(sizes.values()) / 2), max(shares) - min(shares)

    counts = min(choices, key=miss)
    return {key: counts[key[1]] for key in units}


def published_share(units: Units, ratio: float) -> Counts:
    """The same share of every structure's units, rounded as LLM-Pruner's program rounds.

    Of C channels ``C − int(C (1 − ratio))`` go; of heads, as many whole ones as these channels fill.
    """
    counts: Counts = {}
    for key, structure in units.items():
        channels = structure.units * structure.head_dim
        counts[key] = (channels - int(channels * (1 - ratio))) // structure.head_dim
    return counts


def lowest(
    units: Units,
    scores: Mapping[Key, Tensor],
    wanted: int,
    least: int = 1,
    kept: Mapping[Key, list[int]] | None = None,
) -> dict[Key, list[int]]:
    """Lets the units of all structures compete: those of the lowest scores go, exact to one unit.

    A unit that is larger than what remains to be removed is passed over.

    Args:
        units: The structures.
        scores: Of their units, comparable from structure to structure.
        wanted: Parameters that are to go.
        least: Units that stay in each structure.
        kept: The units that are still there; None for all.

    Returns:
        By structure, the units that stay, ascending.
    """
    there = {key: set(range(s.units) if kept is None else kept[key]) for key, s in units.items()}
    values = {key: scores[key].tolist() for key in units}
    smallest = min(structure.unit_parameters for structure in units.values())
    order = sorted((values[key][unit], key, unit) for key in units for unit in there[key])
    remaining = wanted
    for _, key, unit in order:
        size = units[key].unit_parameters
        if 2 * remaining < smallest:
            break
        if size <= remaining + smallest / 2 and len(there[key]) > least:
            there[key].remove(unit)
            remaining -= size
    return {key: sorted(left) for key, left in there.items()}


def lowest_in_each(
    scores: Mapping[Key, Tensor], counts: Mapping[Key, int], kept: Mapping[Key, list[int]] | None = None
) -> dict[Key, list[int]]:
    """Of every structure, so many units of the lowest scores go; of equals the first.

    Returns:
        By structure, the units that stay, ascending.
    """
    stay: dict[Key, list[int]] = {}
    for key, count in counts.items():
        there = list(range(len(scores[key]))) if kept is None else list(kept[key])
        value: Callable[[int], float] = scores[key].tolist().__getitem__
        stay[key] = sorted(sorted(there, key=value)[count:])
    return stay
