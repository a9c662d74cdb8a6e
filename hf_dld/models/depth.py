"""Which encoder layers run: choosing them for inference and drawing them for training. Pure functions.

Nothing here touches tensors or global random state: the encoder loop only obeys what is decided here.
"""

import operator
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

LAYER_SELECTIONS = ("even", "first", "schedule")
DEPTH_SAMPLINGS = ("bernoulli", "uniform", "selection", "balanced", "sandwich")
MAX_HIDDEN_LAYERS = 1000  # a damaged config.json may ask for any number, and building them would never end


def check_num_hidden_layers(num_hidden_layers: int) -> None:
    """Raise `ValueError` unless it is an integer from 1 to `MAX_HIDDEN_LAYERS`."""
    is_integer = isinstance(num_hidden_layers, int) and not isinstance(num_hidden_layers, bool)
    if not is_integer or not 1 <= num_hidden_layers <= MAX_HIDDEN_LAYERS:
        raise ValueError(
            f"num_hidden_layers must be an integer from 1 to {MAX_HIDDEN_LAYERS}; got {num_hidden_layers!r}."
        )


def check_num_active_layers(num_active_layers: int, num_hidden_layers: int) -> int:
    """Return the count as an `int`, or raise `ValueError` when the model cannot run that many layers."""
    try:
        count = operator.index(num_active_layers)
    except TypeError:
        count = None
    if count is None or isinstance(num_active_layers, bool) or not 1 <= count <= num_hidden_layers:
        raise ValueError(
            f"num_active_layers must be an integer from 1 to {num_hidden_layers}, because the encoder has "
            f"{num_hidden_layers} layers (None means all of them); got {num_active_layers!r}."
        )
    return count


def is_count(active_layers: Any) -> bool:
    """Whether it says how many layers run (a number, of whatever library, or `None` for all) rather than which ones."""
    return np.ndim(active_layers) == 0 and not isinstance(active_layers, set | frozenset | dict)


def check_active_layers(
    active_layers: Sequence[int], num_hidden_layers: int, name: str = "active_layers"
) -> tuple[int, ...]:
    """Return the layer indices as a tuple, or raise `ValueError` when they do not name layers of the encoder.

    Args:
        active_layers: strictly ascending 0-based indices, at least one.
        num_hidden_layers: layers of the encoder.
        name: what the error calls them.
    """
    try:
        if isinstance(active_layers, str | dict) or any(isinstance(index, bool) for index in active_layers):
            raise TypeError
        indices = tuple(operator.index(index) for index in active_layers)
    except TypeError:
        indices = ()
    in_range = all(0 <= index < num_hidden_layers for index in indices)
    if not indices or not in_range or any(low >= high for low, high in zip(indices, indices[1:], strict=False)):
        raise ValueError(
            f"{name} must be strictly ascending layer indices from 0 to {num_hidden_layers - 1}, at least one, "
            f"because the encoder has {num_hidden_layers} layers; got {active_layers!r}."
        )
    return indices


def check_present(active_layers: Sequence[int], pruned_layers: Sequence[int], num_hidden_layers: int) -> None:
    """Raise `ValueError` if one of the layers that should run was pruned."""
    absent = [index for index in active_layers if index in pruned_layers]
    if absent:
        present = [index for index in range(num_hidden_layers) if index not in pruned_layers]
        raise ValueError(
            f"Layers {list(active_layers)} cannot run: {absent} were pruned when the model was loaded with "
            f"prune_inactive_layers=True, which left {present} of {num_hidden_layers} layers. Load the whole "
            "checkpoint without prune_inactive_layers, or with the layers that you need."
        )


def check_depth_schedule(depth_schedule: Sequence[Sequence[int]], num_hidden_layers: int) -> None:
    """Raise `ValueError` unless `depth_schedule[k - 1]` names k layers for every k from 1 to `num_hidden_layers`."""
    try:
        lengths = [len(layers) for layers in depth_schedule]
    except TypeError:
        raise ValueError(
            f"depth_schedule must be a list of lists of layer indices; got {depth_schedule!r:.200}."
        ) from None
    if lengths != list(range(1, num_hidden_layers + 1)):
        raise ValueError(
            f"depth_schedule must list, for every count from 1 to {num_hidden_layers}, that many layer indices; "
            f"got lists of {lengths} indices."
        )
    for layers in depth_schedule:
        check_active_layers(layers, num_hidden_layers)


def select_layers(
    num_active_layers: int,
    num_hidden_layers: int,
    layer_selection: str = "even",
    depth_schedule: Sequence[Sequence[int]] | None = None,
) -> tuple[int, ...]:
    """Turn a count of layers into the indices of the layers that run.

    Args:
        num_active_layers: how many layers run, 1 to `num_hidden_layers`.
        num_hidden_layers: layers of the encoder.
        layer_selection: `"even"` spreads them, `round(linspace(0, N - 1, k))`, as LayerDrop (arXiv 1909.11556)
            does at inference; `"first"` keeps the first k; `"schedule"` looks them up in `depth_schedule`.
        depth_schedule: for `"schedule"`: `depth_schedule[k - 1]` are the k indices.

    Returns:
        Ascending 0-based indices.
    """
    count = check_num_active_layers(num_active_layers, num_hidden_layers)
    if layer_selection == "even":
        # exact division, so that ties round as linspace's would and not as its rounding error says
        return tuple(round(i * (num_hidden_layers - 1) / max(count - 1, 1)) for i in range(count))
    if layer_selection == "first":
        return tuple(range(count))
    if layer_selection == "schedule":
        if depth_schedule is None:
            raise ValueError('layer_selection="schedule" needs a depth_schedule, and the config has none.')
        return check_active_layers(depth_schedule[count - 1], num_hidden_layers)
    raise ValueError(f"layer_selection must be one of {LAYER_SELECTIONS}; got {layer_selection!r}.")


def sample_layers(
    num_hidden_layers: int,
    depth_sampling: str = "balanced",
    *,
    seed: int,
    step: int,
    layerdrop: float = 0.5,
    layer_selection: str = "even",
    depth_schedule: Sequence[Sequence[int]] | None = None,
) -> list[tuple[int, ...]]:
    """Draw the sets of layers that one optimizer step trains: a function of (`seed`, `step`) and nothing else.

    Args:
        num_hidden_layers: layers of the encoder.
        depth_sampling: `"bernoulli"`: every layer is skipped with probability `layerdrop`, an empty draw is drawn
            again (the gates of DLD, arXiv 2601.16117, and of LayerDrop, arXiv 1909.11556); `"uniform"`: any count,
            any layers; `"selection"`: any count, the layers that inference would use for it; `"balanced"`: the same,
            a count k with a probability proportional to 1/k, so that all get the same compute; `"sandwich"`: the full
            depth and one shallower `"selection"` draw.
        seed: seed of the run.
        step: optimizer step, so every rank and every accumulated micro-batch of a step draws the same layers.
        layerdrop: for `"bernoulli"`: the probability that a layer is skipped, 0 <= p < 1.
        layer_selection: for `"selection"`, `"balanced"` and `"sandwich"`, as in `select_layers`.
        depth_schedule: as in `select_layers`.

    Returns:
        One set of ascending indices, two for `"sandwich"` (the full depth first).
    """
    # a string seed is hashed with SHA-512: the same on every platform, and steps of nearby seeds are unrelated
    rng = random.Random(f"{seed}-{step}")
    layers = range(num_hidden_layers)
    if depth_sampling == "bernoulli":
        if not 0 <= layerdrop < 1:
            raise ValueError(f"layerdrop must be at least 0 and below 1, else no layer ever runs; got {layerdrop!r}.")
        drawn: tuple[int, ...] = ()
        while not drawn:
            drawn = tuple(index for index in layers if rng.random() >= layerdrop)
        return [drawn]
    if depth_sampling == "uniform":
        return [tuple(sorted(rng.sample(layers, rng.randint(1, num_hidden_layers))))]
    if depth_sampling == "selection":
        count = rng.randint(1, num_hidden_layers)
        return [select_layers(count, num_hidden_layers, layer_selection, depth_schedule)]
    if depth_sampling == "balanced":
        counts = range(1, num_hidden_layers + 1)
        [count] = rng.choices(counts, [1 / count for count in counts])
        return [select_layers(count, num_hidden_layers, layer_selection, depth_schedule)]
    if depth_sampling == "sandwich":
        count = rng.randint(1, max(num_hidden_layers - 1, 1))
        return [tuple(layers), select_layers(count, num_hidden_layers, layer_selection, depth_schedule)]
    raise ValueError(f"depth_sampling must be one of {DEPTH_SAMPLINGS}; got {depth_sampling!r}.")
