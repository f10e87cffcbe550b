"""Torch-Pruning: restores what its pruner removes, in closed form, without labels.

    for group in pruner.step(interactive=True):
        compensate(model, group, batches)
        group.prune()

or, in one line and with the whole network's drift corrected,

    restored = prune(pruner, batches)

Both keep the shapes that Torch-Pruning alone gives. What is pruned, and in which order, is its
choice. `sites_of` gives its groups as sites for `grail.compress`.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from tqdm import tqdm

from grail.adapters._passes import Batches, collect_dense, collect_narrow, probed, require_sound
from grail.adapters._pruning_groups import NarrowNorms, Trail, library, readers, set_heads
from grail.adapters._pruning_sites import Sites, sites_of
from grail.adapters._refit import Auto, Settings
from grail.algebra._fit import Toward, check_settings
from grail.arguments import plain, require_model, require_switches
from grail.errors import ModelError, one_line
from grail.runtime.transaction import eval_no_grad

__all__ = ("Restored", "Sites", "compensate", "prune", "sites_of")


@dataclass
class Restored:
    """The layers that were refitted.

    Attributes:
        errors: by name, ‖T − Y‖/‖T‖ on the calibration's tokens, of plain pruning and restored: Y
            is what the layer returns, T what it should return. Of layers that are fitted by channel
            T is the layer's input instead, and of layers that read one input together all outputs.
        skipped: by name, the reason why a layer is left as Torch-Pruning prunes it.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Restored({len(self.errors)} layers, {len(self.skipped)} skipped)"


def compensate(
    model: nn.Module,
    group: Any,
    batches: Iterable[Any],
    *,
    alpha: float | Auto = "auto",
    toward: Toward = "baseline",
    fit_bias: bool = True,
    per_tap: bool | Auto = "auto",
) -> Restored:
    """Refits the layers that read a group's channels, so that `group.prune()` costs less.

    Call it between groups, before `group.prune()`. The model runs once over the batches, up to the
    last of these layers, and a first time over one batch. Only columns that stay are rewritten, and
    biases.

    Args:
        model: of the pruner. It runs in evaluation mode; its modes and batch norms do not change.
        group: of `pruner.step(interactive=True)` or `DependencyGraph.get_pruning_group`.
        batches: unlabelled inputs of the model: tensors, tuples of its arguments, or mappings of
            its keyword arguments. They are moved to the model's device.
        alpha, toward: of the ridge, see `grail.fit`. "auto" chooses α on every fifth batch; of
            fewer than five on the last, and of one batch there is nothing to choose by.
        fit_bias: also fits biases. A layer without one is shifted in the batch norm directly after
            it; no parameter is added.
        per_tap: whether each tap of a convolution, and each position of a flattened map, is fitted
            separately. "auto" does where there are at most 4096 columns and as many tokens; else
            one map of channels serves all.

    Returns:
        `Restored`; empty for a group that no layer reads.

    Raises:
        InputError: a group of another model, batches that the model does not take or settings that
            are not allowed.
        EmptyCalibrationError: no batch, or no token.
        NonFiniteError: NaN or Inf in what a layer reads or returns.

    The model is unchanged after an error.
    """
    require_model(model)
    settings = _checked(alpha, toward, fit_bias, per_tap)
    every = Batches(batches)
    layers, skipped = readers(model, group)
    restored = Restored(skipped=skipped)
    if not layers:
        return restored
    with eval_no_grad(model):
        found, missing = probed(model, layers, every, settings)
        restored.skipped |= missing
        with NarrowNorms(group) as norms:
            collect_dense(model, found, every, norms.narrowed, norms.forget)
        fits = [each.reading.fit(settings) for each in found]
    for fit in fits:
        fit.write()
        restored.errors |= fit.errors
    return restored


def prune(
    pruner: Any,
    batches: Iterable[Any],
    *,
    update: Callable[[nn.Module], None] | None = None,
    alpha: float | Auto = "auto",
    toward: Toward = "baseline",
    fit_bias: bool = True,
    per_tap: bool | Auto = "auto",
    progress: bool = True,
) -> Restored:
    """Prunes by one step of a pruner, then restores the whole network.

    After all groups of the step are pruned, each layer that reads pruned channels is refitted in
    the order in which they run. It reads what the pruned and restored layers before it give, and
    should return what the dense network returned there. So drift is corrected, also that of layer
    norms and attention over fewer channels, which `compensate` cannot know. Costs a copy of the
    model, and for each layer a pass of both networks up to it.

    Args:
        pruner: of Torch-Pruning, for instance `BasePruner`; its model is changed in place.
        update: called with the pruned model before it runs, to set attributes that hold widths. The
            number and width of heads of attention modules whose layers are in `pruner.num_heads`
            are set without.
        progress: whether a bar is shown.
        batches, alpha, toward, fit_bias, per_tap: see `compensate`.

    Raises:
        InputError, EmptyCalibrationError, NonFiniteError: as `compensate`, before the model is
            changed: the dense network runs over all batches first.
        ModelError: the pruned network does not run.
    """
    model = library.attribute(pruner, "model")
    settings = _checked(alpha, toward, fit_bias, per_tap)
    require_switches(progress=progress)
    every = Batches(batches)
    with eval_no_grad(model):
        require_sound(model, every)
    try:
        dense = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(f"the model cannot be copied ({one_line(error)})") from error
    trail = Trail(pruner, dense)
    for group in pruner.step(interactive=True):
        trail.note(group)
        group.prune()
        set_heads(pruner)
    if update is not None:
        update(model)
    with eval_no_grad(model), eval_no_grad(dense):
        return _restored(dense, trail, every, settings, progress)


def _restored(
    dense: nn.Module, trail: "Trail", batches: Batches, settings: Settings, progress: bool
) -> Restored:
    """Refits the layers of a pruned model that read pruned channels, in order."""
    model: nn.Module = trail.model
    layers, skipped = trail.readers()
    restored = Restored(skipped=skipped)
    if not layers:
        return restored
    try:
        found, missing = probed(model, layers, batches, settings)
    except Exception as error:
        raise ModelError(
            f"the pruned network does not run ({one_line(error)}); set attributes that hold widths "
            "in prune(update=…), or ignore the layer"
        ) from error
    restored.skipped |= missing
    for each in tqdm(found, unit="layer", disable=not progress, desc="restore"):
        collect_narrow(model, dense, each, batches)
        fit = each.reading.fit(settings)
        fit.write()
        restored.errors |= fit.errors
    return restored


def _checked(alpha: float | Auto, toward: Toward, fit_bias: bool, per_tap: bool | Auto) -> Settings:
    """Returns the settings; raises InputError for one that is not allowed."""
    alpha = plain(alpha)
    check_settings(alpha, toward, 1.0)
    require_switches(fit_bias=fit_bias)
    if per_tap != "auto":
        require_switches(per_tap=per_tap)
    return Settings(alpha, toward, fit_bias, per_tap)
