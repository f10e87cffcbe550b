"""A Gram for each layer of a model while any loop runs it, for other libraries' calibration.

    with grail.accumulate(model) as grams:
        for batch in batches:
            model(**batch)
    H = grams["model.layers.0.mlp.down_proj"].hessian(per="sample", scale=2)

Layers that read the same tensor, as query, key and value do, share one Gram. They are found in
their first call, by the identity of the tensor object. Where a later call contradicts, the Gram is
divided, so that each layer has the sum of what it read.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import grail_kernels as gk
from grail.algebra.gram import Gram, NonFinite
from grail.algebra.kinds import columns, window
from grail.arguments import require_model, require_switches
from grail.errors import InputError, ModelError
from grail.run.exchange import all_reduce
from grail.runtime.hooks import input_of
from grail.runtime.processes import ProcessGroup, current_processes

Key = TypeVar("Key")
Layers = Iterable[str] | Callable[[str, nn.Module], bool] | None


class SharedGrams(Mapping[Key, Gram]):
    """The Gram of each layer, by any key; layers that read the same tensors share one.

    A layer joins the Gram of another in its first call. From then on an input waits until all
    layers of the Gram have read it, and is added then. Where another input comes first, those that
    did not read it get a copy of the Gram without it.

    Args:
        share: whether layers share Grams.
        convert: applied to an input before it is added to a Gram; default nothing.

    `groups`: the keys that share a Gram, a tuple for each Gram, in the order of the layers.
    """

    def __init__(self, share: bool = True, convert: Callable[[Gram, Tensor], Tensor] | None = None):
        self._shares, self._convert = share, convert
        self._owners: dict[Key, _SharedGram[Key]] = {}
        self._by_input: dict[int, _SharedGram[Key]] = {}  # by id of the tensor that each added last

    def enter(self, key: Key, module: nn.Module, make: Callable[[], Gram]) -> None:
        """Enters a layer that has read nothing so far; `make` returns an empty Gram for it."""
        self._owners[key] = _SharedGram([key], make, window(module))

    def __getitem__(self, key: Key) -> Gram:
        return self._owners[key].gram

    def __iter__(self) -> Iterator[Key]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def groups(self) -> list[tuple[Key, ...]]:
        return [tuple(shared.keys) for shared in dict.fromkeys(self._owners.values())]

    def observe(self, key: Key, module: nn.Module, x: Tensor) -> None:
        """Adds what a layer reads in one call, once for all layers that share its Gram.

        Raises:
            ModelError: an input changed in place before all layers that share the Gram read it.
            InputError, NonFiniteError, StateError: as `Gram.update_from`.
        """
        if not self._shares:
            self._owners[key].gram.update_from(module, self._converted(key, x))
            return
        if self._joins(key, x):
            return
        if not self._owners[key].awaits(key, x):
            self._settle(self._owners[key])
            self._owners[key].expect(module, x)
        shared = self._owners[key]
        shared.seen.add(key)
        if len(shared.seen) == len(shared.keys):
            self._add_waiting(shared)

    def finish(self) -> None:
        """Adds the last inputs for those layers that read them.

        Raises:
            ModelError, InputError, NonFiniteError, StateError: as `observe`.
        """
        for shared in dict.fromkeys(self._owners.values()):
            self._settle(shared)

    def clear(self) -> None:
        """Forgets all layers and their Grams."""
        self._owners.clear()
        self._by_input.clear()

    def _converted(self, key: Key, x: Tensor) -> Tensor:
        return x if self._convert is None else self._convert(self[key], x)

    def _joins(self, key: Key, x: Tensor) -> bool:
        """Joins a layer's Gram in its first call to another that has added only this `x`."""
        own, other = self._owners[key], self._by_input.get(id(x))
        if own.calls or other is None or other.calls != 1 or other is own:
            return False
        alike = (own.gram.channels, own.window) == (other.gram.channels, other.window)
        if not (alike and other.added(x)):
            return False
        other.keys.append(key)
        self._owners[key] = other
        return True

    def _settle(self, shared: "_SharedGram[Key]") -> None:
        """Adds an input that only some of a Gram's layers have read, and divides the Gram."""
        if shared.waiting is None:
            return
        shared.require_unchanged()
        rest = [key for key in shared.keys if key not in shared.seen]
        other = _SharedGram(rest, shared.make, shared.window)
        other.gram.merge(shared.gram)
        other.calls = shared.calls
        self._owners |= dict.fromkeys(rest, other)
        shared.keys = [key for key in shared.keys if key in shared.seen]
        self._add_waiting(shared)

    def _add_waiting(self, shared: "_SharedGram[Key]") -> None:
        module, x = shared.take()
        shared.gram.update_from(module, self._converted(shared.keys[0], x))
        if self._by_input.get(shared.input_id) is shared:
            del self._by_input[shared.input_id]
        shared.note(x)
        self._by_input[id(x)] = shared


class _SharedGram(Generic[Key]):
    """A Gram and the layers that share it.

    `calls`: how many inputs were added. `waiting`: an input that is not added, because only the
    layers `seen` have read it. `window`: what determines the tokens of a convolution.
    """

    def __init__(self, keys: list[Key], make: Callable[[], Gram], window: tuple[Any, ...]):
        self.keys, self.make, self.window = keys, make, window
        self.gram, self.calls, self.input_id = make(), 0, 0
        self.seen: set[Key] = set()
        self.waiting: Tensor | None = None
        self._module: nn.Module | None = None
        self._input: weakref.ref[Tensor] | None = None
        self._version = 0

    def awaits(self, key: Key, x: Tensor) -> bool:
        """Returns whether a layer now reads the input that waits for it."""
        if self.waiting is not x or key in self.seen:
            return False
        self.require_unchanged()
        return True

    def expect(self, module: nn.Module, x: Tensor) -> None:
        """Lets an input wait until all layers have read it."""
        self.waiting, self._module, self.seen = x, module, set()
        if len(self.keys) > 1 or not self.calls:  # else no other layer reads or joins it
            self._version = _version(x)

    def take(self) -> tuple[nn.Module, Tensor]:
        """Returns the input that waited, and a layer that read it."""
        assert self.waiting is not None
        assert self._module is not None
        found = self._module, self.waiting
        self.waiting = self._module = None
        return found

    def note(self, x: Tensor) -> None:
        """Notes that `x` was added."""
        self.calls, self.input_id, self._input = self.calls + 1, id(x), weakref.ref(x)

    def added(self, x: Tensor) -> bool:
        """Returns whether `x` was added last, and has not been changed in place since."""
        return self._input is not None and self._input() is x and self._version == _version(x)

    def require_unchanged(self) -> None:
        """Raises ModelError where the input that waits has been changed in place."""
        if self.waiting is not None and self._version != _version(self.waiting):
            self.waiting = self._module = None
            raise ModelError(
                f"{self.gram.name or 'an input'}: the input changed in place before all of "
                f"{len(self.keys)} layers that share its Gram had read it; call with share=False"
            )


class Grams(Mapping[str, Gram]):
    """The Gram of each layer, by the layer's name; layers that read the same input have the same.

    `groups`: the names that share a Gram, a tuple for each Gram, in the order of the model.
    """

    def __init__(self, layers: Mapping[str, nn.Module], share: bool, settings: Mapping[str, Any]):
        self._shared: SharedGrams[str] = SharedGrams(share)
        for name, module in layers.items():
            self._shared.enter(name, module, partial(Gram.of, module, name=name, **settings))

    def __getitem__(self, name: str) -> Gram:
        return self._shared[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shared)

    def __len__(self) -> int:
        return len(self._shared)

    def __repr__(self) -> str:
        return f"Grams({len(self)} layers, {len(self.groups)} Grams)"

    @property
    def groups(self) -> list[tuple[str, ...]]:
        return self._shared.groups

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sums each Gram over the processes of a `torch.distributed` group, if there are several.

        All processes call it once, after their last batch.

        Raises:
            InputError: other layers share a Gram in another process, as where one had no batch.
            RankError: another process failed or was lost.
        """
        if group is None and current_processes().count == 1:
            return
        ProcessGroup(group).require_equal("the layers that share a Gram", self.groups)
        for names in self.groups:
            all_reduce(self[names[0]], group)

    def observe(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Adds the input of a layer's call, once for all layers that share its Gram."""
        self._shared.observe(name, module, input_of(name, args, kwargs))

    def finish(self) -> None:
        """Adds the last inputs for those layers that read them."""
        self._shared.finish()


def accumulate(
    model: nn.Module,
    layers: Layers = None,
    *,
    share: bool = True,
    device: torch.device | str | None = None,
    non_finite: NonFinite | Literal["propagate"] = "refuse",
) -> AbstractContextManager[Grams]:
    """Sums the Gram of what each layer reads while the caller runs the model in a `with` block.

    Args:
        model: run it in any way. Under `torch.inference_mode` shared inputs are read once more to
            see that nothing has changed them in place; under `torch.no_grad` that costs nothing.
        layers: the names of layers, or a function of name and module that returns whether to
            observe one; default all Linear, convolutions and transformers' Conv1D. Experts whose
            weights are one tensor of three axes are no layers; `grail.collect` observes them.
        share: whether layers that read the same tensor share a Gram.
        device: see `Gram`; default that of each layer's input.
        non_finite: see `Gram`.

    Returns:
        A context that gives `Grams`, by name of layer; they stay after the block. Call
        `all_reduce` on them if several processes each run a share of the batches.

    Raises:
        InputError: an unknown name, no layer to observe, or another bad argument.
        ModelError: a named layer of another kind; in a call or at the end of the block, an input
            that changed in place before all layers that share its Gram had read it.
        NonFiniteError: in the call of a layer that reads NaN or Inf.
    """
    require_model(model)
    require_switches(share=share)
    found = _layers(model, layers)
    return _observed(found, Grams(found, share, {"device": device, "non_finite": non_finite}))


@contextmanager
def _observed(layers: Mapping[str, nn.Module], grams: Grams) -> Iterator[Grams]:
    with ExitStack() as hooks:
        for name, module in layers.items():
            hook = partial(grams.observe, name)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield grams
    grams.finish()


def _layers(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Returns the layers to observe, by name."""
    modules = dict(model.named_modules())
    if layers is None or callable(layers):
        chosen = {
            name: module
            for name, module in modules.items()
            if _is_known(module) and (layers is None or layers(name, module))
        }
        if not chosen:
            raise InputError(f"no layer of {type(model).__name__} is left to observe")
        return chosen
    if not isinstance(layers, Iterable):
        raise InputError(f"layers must be names or a function; got {gk.kind_of(layers)}")
    names = [layers] if isinstance(layers, str) else list(layers)
    if unknown := [name for name in names if name not in modules]:
        raise InputError(f"{type(model).__name__} has no layer {', '.join(map(repr, unknown))}")
    if not names:
        raise InputError("layers is empty; name one or more, or leave it out for all")
    for name in names:
        columns(modules[name])
    return {name: modules[name] for name in names}


def _is_known(module: nn.Module) -> bool:
    try:
        return columns(module) > 0
    except ModelError:
        return False


def _version(x: Tensor) -> int:
    """Returns a number that changes where `x` is changed in place."""
    if not x.is_inference():
        return x._version
    return int(torch.hash_tensor(x).item()) if x.numel() else 0
