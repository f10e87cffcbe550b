"""Tries what a layout says of a block, by running a few tokens through it.

See `grail.networks.structure`, which proposes what is tried here.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grail.algebra.reduction import Selection
from grail.algebra.rounding import is_close
from grail.calibrate.stream import Stream
from grail.errors import GrailError, ModelError
from grail.networks.layers import Consumer
from grail.networks.site import BoundSite
from grail.networks.transformer import Layout, Mlp, ProbeSpec, Transformer
from grail.runtime.hooks import replaced_forward
from grail.runtime.memory import ran_out
from grail.runtime.transaction import Transaction

# Of the norm of what is compared: fp32 sums in another order, through a softmax; and 16 bits.
ROUNDING = {4: 1e-4, 8: 1e-6, 2: 3e-2}

KINDS = ("heads", "mlp", "shared_experts", "experts")  # in the order in which they run
NO_MLP = Mlp((), "")


class NarrowsNot(Exception):  # noqa: N818, an answer
    """Says why a site is none."""


class Trial:
    """One block, run alone.

    Args:
        model, path: the model, and the path of its list of blocks.
        stream: a batch at the entry of its first block.
        number: of the block.
    """

    def __init__(self, model: Any, path: str, stream: Stream, number: int):
        self._model, self._path, self._stream, self._number = model, path, stream, number
        self._block = stream.blocks[number]
        self._hidden = stream.hidden[0].shape[-1]

    def run(self) -> Tensor:
        output = self._stream.run(self._number, 0)
        if not isinstance(output, Tensor):
            raise ModelError(f"a block returns a {type(output).__name__}, not hidden states")
        return output

    def in_order(self) -> list[tuple[str, nn.Module]]:
        """The plain layers of the block in the order in which they run."""
        names = {module: name for name, module in self._block.named_modules()}
        ran: dict[nn.Module, None] = {}
        with ExitStack() as hooks:
            for module, name in names.items():
                if self.is_plain(name, module):
                    note = module.register_forward_pre_hook(lambda m, _: ran.setdefault(m))
                    hooks.callback(note.remove)
            self.run()
        return [(names[module], module) for module in ran]

    @staticmethod
    def is_plain(name: str, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
            return False
        try:
            Consumer(name, module)
        except ModelError:
            return False
        return True

    def replays(self, path: str) -> bool:
        """Whether the rest of a block needs nothing of a module but its first output."""
        module, seen = self._block.get_submodule(path), []
        with ExitStack() as hooks:
            note = module.register_forward_hook(lambda _, __, output: seen.append(output))
            hooks.callback(note.remove)
            expected = self.run()
        if len(seen) != 1:
            return False
        (output,) = seen
        if isinstance(output, tuple):
            output = (output[0], *(None for _ in output[1:]))
        try:
            with replaced_forward(module, lambda *_, **__: output):
                return torch.equal(self.run(), expected)
        except Exception:  # whatever the block raises for what it misses
            return False

    def _bound(self, layout: Layout, kind: str) -> list[BoundSite]:
        """The sites of a kind that a layout makes of the block."""
        layouts = [Layout(self._path, "", NO_MLP) for _ in self._stream.blocks]
        layouts[self._number] = layout
        try:
            candidate = Transformer(self._model, layouts)
            candidate.kinds = KINDS
            return candidate.sites((kind,))[self._number]
        except (ModelError, AttributeError, ZeroDivisionError) as error:
            raise NarrowsNot(str(error)) from error

    def narrows(self, layout: Layout, kind: str) -> BoundSite:
        """The site of that kind.

        Raises:
            NarrowsNot: its consumer does not read its channels, or not each by itself.
        """
        (site,) = self._bound(layout, kind)
        (consumer,) = site.consumers
        before = self._read_by(consumer)
        try:
            width = site.width(0.5, None)
        except (GrailError, ValueError) as error:
            raise NarrowsNot(f"{site.name} can have no other width: {error}") from error
        chosen = width.best(before.flatten(0, -2).float().square().sum(0))
        if chosen.kept == site.channels or before.shape[-1] != site.channels:
            raise NarrowsNot(f"{site.name} can have no other width than {site.channels} channels")
        with _undone() as transaction:
            try:
                site.narrow(chosen, width, transaction)
                kept = consumer.by_channel[:, chosen.index]
                consumer.rewrite(kept, chosen.kept, False, None, transaction)
                after = self._read_by(consumer)
            except Exception as error:  # whatever a block raises for what it cannot be
                if ran_out(error):
                    raise
                raise NarrowsNot(self._between(site, chosen.channels, error)) from error
        if not _alike(after, before[..., chosen.index]):
            raise NarrowsNot(
                f"what {consumer.name} reads of a channel depends on the other channels: a norm, a "
                "softmax, a choice or attention lies between"
            )
        return site

    def _between(self, site: BoundSite, channels: int, error: Exception) -> str:
        """Returns a likely cause for a site of H channels that does not run once it is narrow."""
        owner = site.consumers[0].name.rpartition(".")[0]
        for name, tensor in self._model.get_submodule(owner).named_parameters():
            if tensor.dim() == 1 and len(tensor) == channels and not name.endswith("bias"):
                return f"{owner}.{name} is of each channel of {site.name}, between its layers"
        return f"{site.name} does not run once it is narrow: {first_line(error)}"

    def narrow_together(self, layout: Layout, path: str, module: Any) -> None:
        """Raises NarrowsNot for experts that cannot be narrowed, or not heard."""
        sites = self._bound(layout, "experts")
        if getattr(module, "has_post_expert_norm", False):
            raise NarrowsNot(f"{path} has a norm behind each expert")
        self._are_heard(sites, module)
        chosen: dict[BoundSite, Selection] = {}
        for site in sites:
            scores = sum(rows.float().square().sum(1) for rows in site.weights())
            assert isinstance(scores, Tensor)
            chosen[site] = site.width(0.5, None).best(scores)
        with _undone() as transaction:
            weights = [consumer.by_channel for site in sites for consumer in site.consumers]
            silent = torch.stack(weights)
            for number, selection in enumerate(chosen.values()):
                lost = torch.ones(selection.channels, dtype=torch.bool)
                lost[selection.index] = False
                silent[number][:, lost] = 0
            transposed = getattr(module, "is_transposed", False)
            silent = silent.mT if transposed else silent
            transaction.set_parameter(module, "down_proj", silent)
            expected = self.returned(module)
        with _undone() as transaction:
            try:
                for site, selection in chosen.items():
                    (consumer,) = site.consumers
                    kept = consumer.by_channel[:, selection.index]
                    site.narrow(selection, site.width(0.5, None), transaction)
                    consumer.rewrite(kept, selection.kept, False, None, transaction)
                after = self.returned(module)
            except Exception as error:  # whatever a block raises for what it cannot be
                if ran_out(error):
                    raise
                raise NarrowsNot(
                    f"{path} does not run once it is narrow: {first_line(error)}"
                ) from error
        if not _alike(after, expected):
            raise NarrowsNot(f"a channel of an expert of {path} depends on the other channels")

    def _are_heard(self, sites: Sequence[BoundSite], module: Any) -> None:
        """Raises NarrowsNot unless experts run one by one, and are added up by given weights."""
        calls: list[Any] = []
        with ExitStack() as hooks:
            note = module.register_forward_pre_hook(lambda _, args: calls.append(args))
            hooks.callback(note.remove)
            for site in sites:
                hooks.enter_context(site.consumers[0].watch(lambda *_: None))
            try:
                self.run()
            except Exception as error:  # of `grail.networks.experts`, or of arguments of other form
                raise NarrowsNot(f"its experts cannot be heard one by one: {error}") from error
        (first, *further) = calls or [()]
        if further or len(first) != 3 or first[0].dim() != 2 or not isinstance(first[2], Tensor):
            raise NarrowsNot("its experts are called otherwise than with tokens, choices, weights")
        hidden, choices, weights = first
        once, twice = module(hidden, choices, weights), module(hidden, choices, 2 * weights)
        if not _alike(twice, 2 * once):
            raise NarrowsNot("its experts are not added up by the router's weights")

    def _read_by(self, consumer: Consumer) -> Tensor:
        seen: list[Tensor] = []
        with consumer.watch(lambda x, _: seen.append(x.clone())):
            self.run()
        if len(seen) != 1:
            raise NarrowsNot(f"{consumer.name} runs {len(seen)} times")
        return seen[0]

    def returned(self, module: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            self.run()
        finally:
            handle.remove()
        return seen[0]

    def probe(self, path: str, outputs: int) -> ProbeSpec | None:
        """The last place that shows a change of a layer's output one to one."""
        change = torch.linspace(-1, 1, outputs, dtype=torch.float32)
        without = self._after(path, None)
        changed = self._after(path, change)
        for place in reversed(list(without)):
            if place not in changed or without[place].shape != changed[place].shape:
                continue
            if without[place].shape[-1] != outputs:
                continue
            factor = _factor(changed[place], without[place], change)
            if factor is not None:
                scale = "" if abs(factor - 1) < 1e-2 else self._number_of(factor)
                if scale is not None:
                    return ProbeSpec(place, scale=scale)
        return ProbeSpec(path, output=True)

    def _number_of(self, factor: float) -> str | None:
        """The path of an attribute of the block that is a number of that size."""
        for owner, module in self._block.named_modules():
            numbers = {**vars(module), **dict(module.named_buffers(recurse=False))}
            for name, value in numbers.items():
                single = isinstance(value, float) or (
                    isinstance(value, Tensor) and value.numel() == 1
                )
                if single and abs(float(value) / factor - 1) < 1e-2:
                    return f"{owner}.{name}".removeprefix(".")
        return None

    def _after(self, path: str, change: Tensor | None) -> dict[str, Tensor]:
        """Returns what modules read after a layer has run, by path; "" is the block's output."""
        layer = self._block.get_submodule(path)
        seen: dict[str, Tensor] = {}
        ran = False

        def add(_: nn.Module, __: Any, output: Any) -> Any:
            nonlocal ran
            ran = True
            return output if change is None else output + change.to(output)

        def reading(name: str) -> Callable[..., None]:
            def read(_: nn.Module, args: tuple[Any, ...]) -> None:
                if ran and args and isinstance(args[0], Tensor) and name not in seen:
                    seen[name] = args[0].clone()

            return read

        with ExitStack() as hooks:
            hooks.callback(layer.register_forward_hook(add).remove)
            for name, module in self._block.named_modules():
                if name and module is not layer:
                    hooks.callback(module.register_forward_pre_hook(reading(name)).remove)
            output = self.run()
        return {**seen, "": output}


@dataclass
class _undone:  # noqa: N801, a context manager
    """A transaction that is taken back at its end."""

    def __enter__(self) -> Transaction:
        self._transaction = Transaction()
        return self._transaction

    def __exit__(self, *_: object) -> None:
        self._transaction.undo()


def _tolerance(tensor: Tensor) -> float:
    return ROUNDING[tensor.element_size()]


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Returns whether tensors are equal up to rounding, finite, and not all zero."""
    finite = all(bool(tensor.isfinite().all()) for tensor in (found, expected))
    return finite and bool(expected.any()) and is_close(found, expected, _tolerance(expected))


def _factor(changed: Tensor, without: Tensor, change: Tensor) -> float | None:
    """By how much a change [O] shows in the difference of two tensors [..., O], if it does."""
    difference = (changed.float() - without.float()).reshape(-1, without.shape[-1])
    change = change.to(difference)
    factor = float((difference @ change).mean() / change.square().sum())
    wanted = factor * change.expand_as(difference)
    # Hidden states of some size, rounded, hide the last digits of a change of one.
    size = wanted.norm() + 1e-2 * without.float().norm()
    close = bool((difference - wanted).norm() <= _tolerance(without) * size)
    return factor if close and abs(factor) > 1e-3 else None


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]
