"""Passes over calibration batches: what reads together, what is collected, where a forward ends."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grail.adapters._refit import (
    Call,
    Layer,
    Reading,
    Settings,
    run_until_stopped,
    watching,
)
from grail.algebra.kinds import MAPS, window
from grail.arguments import require_batches
from grail.calibrate.batches import model_inputs
from grail.errors import EmptyCalibrationError, InputError, ModelError, NonFiniteError
from grail.runtime.hooks import Stop, input_of

HELD_OUT = 5  # every fifth batch is held out for the choice of α


class Batches(Iterable[Any]):
    """Batches that can be read again, and their number.

    Raises:
        InputError: no iterable of batches.
        EmptyCalibrationError: no batch.
    """

    def __init__(self, batches: Any):
        require_batches(batches)
        again = hasattr(batches, "__len__") and iter(batches) is not batches
        self._batches = batches if again else list(batches)
        if not len(self):
            raise EmptyCalibrationError("batches is empty; give one or more")

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def runs(self, *models: nn.Module) -> Iterator[tuple[Callable[[], Any], ...]]:
        """Yields for each batch the functions that run the models on it."""
        devices = [_device(model) for model in models]
        for batch in self:
            yield tuple(
                _run(model, batch, device) for model, device in zip(models, devices, strict=True)
            )

    def holds_out(self, number: int) -> bool:
        """Returns whether a batch is held out for the choice of α."""
        if len(self) < HELD_OUT:
            return 0 < number == len(self) - 1
        return number % HELD_OUT == HELD_OUT - 1


def _run(model: nn.Module, batch: Any, device: torch.device) -> Callable[[], Any]:
    args, kwargs = model_inputs(model, batch, device)
    return lambda: model(*args, **kwargs)


def _device(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        if parameter.is_meta:
            raise InputError("the model is on the meta device, where tensors hold no values")
        return parameter.device
    raise ModelError(f"a {type(model).__name__} has no parameters")


def require_sound(model: nn.Module, batches: Batches) -> None:
    """Runs all batches; raises NonFiniteError where a layer returns NaN or Inf."""

    def look(name: str, module: nn.Module, y: Any) -> None:
        if not isinstance(y, Tensor) or bool(y.sum(dtype=torch.float64).isfinite()):
            return
        axis = 1 if isinstance(module, MAPS) else -1
        bad = ~y.isfinite().movedim(axis, -1).flatten(0, -2)
        channels = bad.any(0).nonzero().flatten().tolist()
        raise NonFiniteError(f"outputs of {name}", channels, int(bad.sum()))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, *MAPS)):
                hook = module.register_forward_hook(lambda m, args, y, n=name: look(n, m, y))
                hooks.callback(hook.remove)
        for (run,) in batches.runs(model):
            run()


@dataclass(eq=False)
class Found:
    """Layers that read together, and how often in a forward."""

    reading: Reading
    calls: int


@dataclass(eq=False)
class _Seen:
    """The inputs of one layer in a forward. `x`, `version`: of its last call."""

    layer: Layer
    x: Tensor
    version: int
    tokens: int = 0
    calls: int = 0

    def joins(self, other: "_Seen") -> bool:
        """Returns whether both read the same values, once, and get the same tokens of them."""
        alike = _form(self.layer) == _form(other.layer) and self.calls == other.calls == 1
        same = self.x is other.x and self.version == other.version
        return alike and same and torch.equal(self.layer.kept, other.layer.kept)


def probed(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, settings: Settings
) -> tuple[list[Found], dict[str, str]]:
    """Runs one batch to see in which order layers run, and which read one input together.

    Returns:
        The layers in order, and by name the reason for those that do not run.
    """
    seen: dict[str, _Seen] = {}

    def look(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        x = input_of(layer.name, args, kwargs)
        version = 0 if x.is_inference() else x._version
        known = seen.setdefault(layer.name, _Seen(layer, x, version))
        known.x, known.version, known.calls = x, version, known.calls + 1
        channels = y.shape[1 if isinstance(layer.module, MAPS) else -1]
        known.tokens += y.numel() // max(1, channels)

    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.module.register_forward_hook(
                lambda _, args, kwargs, y, layer=layer: look(layer, args, kwargs, y),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        run = next(iter(batches.runs(model)))[0]
        run()
    found: list[tuple[_Seen, Found]] = []
    for each in seen.values():
        by_column = each.layer.by_column(settings.per_tap, each.tokens * len(batches), each.x.dim())
        others = (f for s, f in found if s.joins(each) and f.reading.by_column == by_column)
        if (other := next(others, None)) is not None:
            other.reading.layers.append(each.layer)
        else:
            found.append((each, Found(Reading([each.layer], by_column), each.calls)))
    missing = {
        layer.name: "the model does not run it on the first batch"
        for layer in layers
        if layer.name not in seen
    }
    return [each for _, each in found], missing


def _form(layer: Layer) -> tuple[Any, ...]:
    """Returns what must be equal for layers to get the same tokens of an input."""
    return window(layer.module) if layer.groups == 1 else (id(layer),)


Narrowed = Callable[[Layer, Tensor], Tensor]


def collect_dense(
    model: nn.Module,
    found: Sequence[Found],
    batches: Batches,
    narrowed: Narrowed,
    begin: Callable[[], None],
) -> None:
    """Adds what layers read and return in the model as it is, in one pass that ends with the last.

    Args:
        narrowed: returns what a layer will read of an input.
        begin: called before each batch.
    """
    left = held_out = 0

    def take(each: Found, call: Call) -> None:
        nonlocal left
        reading = each.reading
        target = call.in_order if reading.by_column else call.x
        reading.add(narrowed(reading.first, call.x), target, bool(held_out))
        left -= 1
        if not left:
            raise Stop

    with ExitStack() as hooks:
        for each in found:
            modules = [layer.module for layer in each.reading.layers]
            taken = lambda call, each=each: take(each, call)  # noqa: E731
            hooks.enter_context(watching(modules, taken, each.reading.by_column))
        for number, (run,) in enumerate(batches.runs(model)):
            left, held_out = sum(each.calls for each in found), batches.holds_out(number)
            begin()
            run_until_stopped(run)


def collect_narrow(model: nn.Module, dense: nn.Module, found: Found, batches: Batches) -> None:
    """Adds what the layers of a reading read in a pruned model, and return in the dense one."""
    reading = found.reading
    references = [layer.reference for layer in reading.layers]
    for number, (run, original) in enumerate(batches.runs(model, dense)):
        want = _calls_of(original, references, found.calls, reading.by_column)
        have = _calls_of(run, [reading.first.module], found.calls, False)
        for wanted, seen in zip(want, have, strict=True):
            target = wanted.in_order if reading.by_column else wanted.x
            reading.add(seen.x, target, batches.holds_out(number))


def _calls_of(
    run: Callable[[], Any], modules: Sequence[nn.Module], count: int, outputs: bool
) -> list[Call]:
    """Returns the joint calls of modules in a forward, which ends after so many of them."""
    calls: list[Call] = []

    def taken(call: Call) -> None:
        calls.append(call)
        if len(calls) == count:
            raise Stop

    with watching(modules, taken, outputs):
        run_until_stopped(run)
    return calls
