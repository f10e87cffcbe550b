"""Trials of a proposed layout: a few tokens run through the narrowed block.

`grail.networks.structure` makes the proposals.
"""

from collections.abc import Callable, Mapping, Sequence
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

# Relative to the norm, by bytes of a value: fp32 sums in another order, fp64, and 16 bits.
ROUNDING = {4: 1e-4, 8: 1e-6, 2: 3e-2}

KINDS = ("heads", "mlp", "shared_experts", "experts")  # in the order in which they run
NO_MLP = Mlp((), "")


class NarrowsNot(Exception):  # noqa: N818, an answer
    """A proposed site that cannot be narrowed; the message is the reason."""


class Trial:
    """Trials of one block, run alone.

    Args:
        model: the model.
        path: of its list of blocks.
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
        """Returns the plain layers of the block in the order in which they run."""
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
        """Returns whether the rest of a block uses only the first output of a module."""
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
        except Exception:  # a block can raise anything at a missing output
            return False

    def _bound(self, layout: Layout, kind: str) -> list[BoundSite]:
        """Returns the sites of a kind of the block by a layout."""
        layouts = [Layout(self._path, "", NO_MLP) for _ in self._stream.blocks]
        layouts[self._number] = layout
        try:
            candidate = Transformer(self._model, layouts)
            candidate.kinds = KINDS
            return candidate.sites((kind,))[self._number]
        except (ModelError, AttributeError, ZeroDivisionError) as error:
            raise NarrowsNot(str(error)) from error

    def narrows(self, layout: Layout, kind: str) -> BoundSite:
        """Narrows the site of that kind and restores it; returns the dense site.

        Raises:
            NarrowsNot: its consumer does not read its channels, or they depend on each other.
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
            except Exception as error:  # a block can raise anything once it is narrow
                if ran_out(error):
                    raise
                raise NarrowsNot(self._cause(site, chosen.channels, error)) from error
        if not _alike(after, before[..., chosen.index]):
            raise NarrowsNot(
                f"what {consumer.name} reads of a channel depends on the other channels: a norm, a "
                "softmax, a choice or attention lies between"
            )
        return site

    def _cause(self, site: BoundSite, channels: int, error: Exception) -> str:
        """Returns a likely cause for a site of H channels that does not run after narrowing."""
        owner = site.consumers[0].name.rpartition(".")[0]
        for name, tensor in self._model.get_submodule(owner).named_parameters():
            if tensor.dim() == 1 and len(tensor) == channels and not name.endswith("bias"):
                return f"{owner}.{name} is of each channel of {site.name}, between its layers"
        return f"{site.name} does not run once it is narrow: {first_line(error)}"

    def narrow_together(self, layout: Layout, path: str, module: Any) -> None:
        """Raises NarrowsNot for experts that cannot be narrowed or observed."""
        sites = self._bound(layout, "experts")
        if getattr(module, "has_post_expert_norm", False):
            raise NarrowsNot(f"{path} has a norm after each expert")
        self._require_observable(sites, module)
        chosen: dict[BoundSite, Selection] = {}
        for site in sites:
            scores = sum(rows.float().square().sum(1) for rows in site.weights())
            assert isinstance(scores, Tensor)
            chosen[site] = site.width(0.5, None).best(scores)
        expected = self._returned_masked(module, chosen)
        after = self._returned_narrow(module, chosen, path)
        if not _alike(after, expected):
            raise NarrowsNot(f"a channel of an expert of {path} depends on the other channels")

    def _returned_masked(self, module: Any, chosen: Mapping[BoundSite, Selection]) -> Tensor:
        """Returns the output of dense experts whose dropped channels are not read."""
        masked = torch.stack([c.by_channel for site in chosen for c in site.consumers])
        for number, selection in enumerate(chosen.values()):
            lost = torch.ones(selection.channels, dtype=torch.bool)
            lost[selection.index] = False
            masked[number][:, lost] = 0
        masked = masked.mT if getattr(module, "is_transposed", False) else masked
        with _undone() as transaction:
            transaction.set_parameter(module, "down_proj", masked)
            return self.returned(module)

    def _returned_narrow(
        self, module: Any, chosen: Mapping[BoundSite, Selection], path: str
    ) -> Tensor:
        """Returns the output of narrowed experts."""
        with _undone() as transaction:
            try:
                for site, selection in chosen.items():
                    (consumer,) = site.consumers
                    kept = consumer.by_channel[:, selection.index]
                    site.narrow(selection, site.width(0.5, None), transaction)
                    consumer.rewrite(kept, selection.kept, False, None, transaction)
                return self.returned(module)
            except Exception as error:  # a block can raise anything once it is narrow
                if ran_out(error):
                    raise
                raise NarrowsNot(
                    f"{path} does not run once it is narrow: {first_line(error)}"
                ) from error

    def _require_observable(self, sites: Sequence[BoundSite], module: Any) -> None:
        """Raises NarrowsNot unless experts run one by one, and are summed by given weights."""
        calls: list[Any] = []
        with ExitStack() as hooks:
            note = module.register_forward_pre_hook(lambda _, args: calls.append(args))
            hooks.callback(note.remove)
            for site in sites:
                hooks.enter_context(site.consumers[0].watch(lambda *_: None))
            try:
                self.run()
            except Exception as error:  # from `grail.networks.experts`, or for other arguments
                raise NarrowsNot(f"its experts cannot be observed one by one: {error}") from error
        (first, *further) = calls or [()]
        if further or len(first) != 3 or first[0].dim() != 2 or not isinstance(first[2], Tensor):
            raise NarrowsNot(
                "its experts are called with other arguments than tokens, choices, weights"
            )
        hidden, choices, weights = first
        once, twice = module(hidden, choices, weights), module(hidden, choices, 2 * weights)
        if not _alike(twice, 2 * once):
            raise NarrowsNot("its experts are not summed by the router's weights")

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
        """Returns a probe at the last input that shows a change of a layer's output one to one."""
        change = torch.linspace(-1, 1, outputs, dtype=torch.float32)
        without = self._after(path, None)
        changed = self._after(path, change)
        for reader, dense in reversed(list(without.items())):
            if reader not in changed or dense.shape != changed[reader].shape:
                continue
            if dense.shape[-1] != outputs:
                continue
            factor = _factor(changed[reader], dense, change)
            if factor is not None:
                scale = "" if abs(factor - 1) < 1e-2 else self._number_of(factor)
                if scale is not None:
                    return ProbeSpec(reader, scale=scale)
        return ProbeSpec(path, output=True)

    def _number_of(self, factor: float) -> str | None:
        """Returns the path of an attribute of the block that is a number of that size."""
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
        """Returns what modules after a layer read, by path; "" is the block's output."""
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
    """A transaction that is undone at its end."""

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
    """Returns the factor of a change [O] in the difference of two tensors [..., O], if any."""
    difference = (changed.float() - without.float()).reshape(-1, without.shape[-1])
    change = change.to(difference)
    factor = float((difference @ change).mean() / change.square().sum())
    wanted = factor * change.expand_as(difference)
    # The rounding of large hidden states hides the last digits of a change of one.
    size = wanted.norm() + 1e-2 * without.float().norm()
    close = bool((difference - wanted).norm() <= _tolerance(without) * size)
    return factor if close and abs(factor) > 1e-3 else None


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]
