"""The calibration set on its way through the model, from block to block.

The model's forward runs once for each batch with every block replaced by a recorder, which costs an
embedding and the masks: what a block is called with (position embeddings, masks that differ by
layer) is whatever the library passes. Blocks are then run one at a time by their own forward with
those arguments.
"""

import copy
import functools
import inspect
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from grail.arguments import require_batches, require_dense, require_usable
from grail.calibrate.embedding import check_token_ids
from grail.calibrate.recorded import state_of, without_cache
from grail.calibrate.samples import Change, Masks, changed_arguments, masks_of
from grail.errors import EmptyCalibrationError, GrailError, InputError, ModelError
from grail.runtime.memory import ran_out
from grail.runtime.processes import Processes

Batch = Tensor | Sequence[Any] | Mapping[str, Any]

# One sequence in so many is held out.
HELD_OUT = 5


class Stop(Exception):  # noqa: N818, it is no error
    """Ends a forward early: what comes after is not needed."""


@dataclass(frozen=True)
class Call:
    """The arguments of one block for one batch, without the hidden states.

    `key`: the name under which those are passed; None is the first place. `state`: of the
    arguments when they were recorded.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None = None
    state: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", self.state_now())

    def state_now(self) -> Any:
        """The state of the arguments, which no pass may change."""
        return state_of((self.args, self.kwargs))


class HiddenStates:
    """One tensor for each batch, in memory that is allocated once.

    Tensors that live long between those of a forward pass would tear the allocator's memory into
    pieces: a quarter of a run's peak.
    """

    def __init__(self, storage: torch.device):
        self._storage = storage
        self._tensors: list[Tensor] = []
        if (created := _created.get()) is not None:
            created.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def put(self, batch: int, tensor: Tensor) -> None:
        """Keeps a copy of the tensor of one batch; the first ones come in order."""
        if batch == len(self._tensors):
            self._tensors.append(tensor.detach().to(self._storage, copy=True))
        elif self._tensors[batch].shape != tensor.shape:
            self._tensors[batch] = tensor.detach().to(self._storage, copy=True)
        else:
            self._tensors[batch].copy_(tensor)

    def __getitem__(self, batch: int) -> Tensor:
        return self._tensors[batch]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def copy(self, storage: torch.device | None = None) -> "HiddenStates":
        """Another one of the same content, there or elsewhere."""
        other = HiddenStates(storage or self._storage)
        for batch, tensor in enumerate(self._tensors):
            other.put(batch, tensor)
        return other


_created: ContextVar["weakref.WeakSet[HiddenStates] | None"] = ContextVar("created", default=None)


@contextmanager
def created_hidden_states() -> Iterator["weakref.WeakSet[HiddenStates]"]:
    """Collects the hidden states that are created inside, as long as they are in use."""
    token = _created.set(weakref.WeakSet())
    try:
        created = _created.get()
        assert created is not None
        yield created
    finally:
        _created.reset(token)


class Stream:
    """Hidden states of every calibration batch at the entry of one block.

    Args:
        model: called as `model(**batch)`, `model(*batch)` or `model(batch)`.
        blocks: the model's blocks in order; the model itself is a block, too.
        batches: LongTensor [B, L] of token ids, other tensors with samples along the first axis
            (images [B, C, H, W]), tuples of the model's arguments, or mappings of its keyword
            arguments, of which an `attention_mask` [B, L] marks the tokens that count.
        storage: where hidden states wait between blocks; the model may be elsewhere.
        ranks: the processes that share the batches; each runs some of them.
        device: where the blocks run; default where the model is.
        room: bytes that hidden states may take in `storage`; beyond, all of them move to the CPU.

    `tokens`: how many were counted, in all processes; samples, where a sample has no tokens
    (images). `own_tokens`: those of this process.

    Raises:
        EmptyCalibrationError: no batch, or no token.
        InputError: a batch of another kind.
        ModelError: blocks that do not run one right after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Iterable[Batch],
        storage: torch.device | str = "cpu",
        processes: Processes | None = None,
        device: torch.device | None = None,
        room: int | None = None,
    ):
        self.blocks, self.storage, self.processes = (
            blocks,
            require_usable(storage),
            processes or Processes(),
        )
        self._room = room
        self._home = next(model.parameters()).device
        self.device = device or self._home
        self.hidden = HiddenStates(self.storage)
        self.masks: list[Masks] = []  # on the CPU, where looking at one stalls no GPU
        self._calls: list[list[Call]] = []
        require_batches(batches)
        self._entries: dict[int, int] = {}  # of the tuple that a block returns, by its number
        for batch in self.processes.share(batches):
            try:
                self._enter(model, batch)
            except ModelError:
                if self._calls or not self._learn_entries(model, batch):
                    raise
                self.hidden, self._room = HiddenStates(self.storage), room
                self._enter(model, batch)
                self.require_chain(model, batch)
        own = range(len(self))
        self.own_tokens = sum(map(self.tokens_of, own))
        self.tokens = int(self.processes.total(torch.tensor(self.own_tokens, dtype=torch.int64)))
        # Of all batches: which samples have a token that counts.
        self._counting = self.processes.interleaved([self._counts(batch) for batch in own])
        if self.tokens == 0:
            raise EmptyCalibrationError(
                "calibration holds no token; pass at least one batch of token ids"
            )
        if len(self._counting) < self.processes.count:
            raise InputError(
                f"{self.processes.count} processes share {len(self._counting)} batches: pass at "
                "least one for each, smaller ones if need be"
            )

    def __len__(self) -> int:
        return len(self.hidden)

    def run(self, block: int, batch: int) -> Any:
        """The block's output for one batch, on the model's device.

        Raises:
            ModelError: the block changes an argument that the next pass needs as it was.
        """
        # A block may write on its input.
        hidden = self.hidden[batch].to(self.device, copy=True)
        return self._run(hidden, block, self._calls[batch][block])

    def run_changed(self, block: int, batch: int, change: Change) -> Any:
        """The block's output for one batch, with every tensor among its arguments changed."""
        call, hidden = self._calls[batch][block], self.hidden[batch].to(self.device, copy=True)
        names = list(inspect.signature(self.blocks[block].forward).parameters)
        args = call.args if call.key is not None else (hidden, *call.args)
        args, kwargs = changed_arguments(names, args, call.kwargs, change)
        if call.key is None:
            return self._run(args[0], block, Call(args[1:], kwargs))
        return self._run(change(call.key, hidden), block, Call(args, kwargs, call.key))

    def _run(self, hidden: Tensor, block: int, call: Call) -> Any:
        try:
            if call.key is None:
                output = self.blocks[block](hidden, *call.args, **call.kwargs)
            else:
                output = self.blocks[block](*call.args, **{call.key: hidden}, **call.kwargs)
        finally:  # a pass may end early
            if call.state_now() != call.state:
                raise ModelError(
                    f"block {block} changes an argument of its own while it runs, as a key/value "
                    "cache is changed, so that no two passes would see the same; switch it off"
                )
        return output[0] if isinstance(output, tuple) else output

    def store(self, batch: int, hidden: Tensor) -> None:
        """Replaces one batch's hidden states by those at the next block's entry."""
        self.hidden.put(batch, hidden)

    def rest_on(self, storage: torch.device) -> None:
        """Lets hidden states wait elsewhere from now on."""
        if storage != self.storage:
            self.hidden, self.storage = self.hidden.copy(storage), storage

    def mask(self, batch: int, decoder: bool = False, length: int | None = None) -> Tensor | None:
        """[B, L] bool on the model's device, or None where every token counts.

        Args:
            batch: its number.
            decoder: whether the mask is for a layer of an encoder-decoder's decoder.
            length: L where the layer reads it, which may be shorter than the model's input.
        """
        mask = self.masks[batch].of(decoder, length)
        return None if mask is None else mask.to(self.device)

    def output_mask(self, batch: int) -> Tensor | None:
        """[B, L] bool on the model's device, of the tokens of the network's output."""
        mask = self.masks[batch].of_output
        return None if mask is None else mask.to(self.device)

    def tokens_of(self, batch: int) -> int:
        """How many tokens of one batch count; samples, where those have no tokens."""
        mask, hidden = self.masks[batch].tokens, self.hidden[batch]
        if mask is not None and self.has_sequences(hidden):
            return int(mask.sum())
        return hidden.shape[: 1 + self.has_sequences(hidden)].numel()

    @property
    def is_masked(self) -> bool:
        """Whether there are tokens in any batch that do not count."""
        masks = itertools.chain(*((m.tokens, m.decoder) for m in self.masks))
        return any(mask is not None for mask in masks)

    @staticmethod
    def has_sequences(hidden: Tensor) -> bool:
        """Whether hidden states have an axis of tokens: [B, L, _], or token ids [B, L]."""
        return hidden.dim() == 3 or (hidden.dim() == 2 and not hidden.is_floating_point())

    @property
    def samples(self) -> int:
        """Sequences, or images."""
        return sum(map(len, self._counting))

    def held_out(self, batch: int) -> Tensor | None:
        """[B] bool on the CPU, every fifth sequence of all (of fewer, the last).

        Sequences of which no token counts are passed over. None where the batch has no other.
        """
        held = self._own_held_out[batch]
        return held if bool(held.any()) else None

    @property
    def holds_out(self) -> bool:
        """Whether there is a sequence to hold out, in any process."""
        return any(bool(held.any()) for held in self._held_out)

    @functools.cached_property
    def _own_held_out(self) -> tuple[Tensor, ...]:
        return tuple(self.processes.share(self._held_out))

    @functools.cached_property
    def _held_out(self) -> tuple[Tensor, ...]:
        """[B] of all batches."""
        counts = torch.cat(self._counting)
        step = max(1, min(HELD_OUT, int(counts.sum())))
        held = counts & (counts.cumsum(0) % step == 0) & (step > 1)
        return held.split([len(counting) for counting in self._counting])

    def _counts(self, batch: int) -> Tensor:
        """[B] bool on the CPU, the samples of one batch of which a token counts."""
        mask, size = self.masks[batch].tokens, self.hidden[batch].shape[0]
        return torch.ones(size, dtype=torch.bool) if mask is None else mask.any(1)

    def fork(self) -> "Stream":
        """A second stream of the same batches, where this one is; each then moves on its own."""
        other = copy.copy(self)
        other.hidden = self.hidden.copy()
        return other

    def part(self, batches: Sequence[int]) -> "Stream":
        """A stream of some batches of this process alone; a batch may come twice."""
        other = copy.copy(self)
        other.processes, other.hidden = Processes(), HiddenStates(self.storage)
        for number, batch in enumerate(batches):
            other.hidden.put(number, self.hidden[batch])
        other.masks = [self.masks[batch] for batch in batches]
        other._calls = [self._calls[batch] for batch in batches]
        other._own_held_out = tuple(self._own_held_out[batch] for batch in batches)
        return other

    def _enter(self, model: nn.Module, batch: Batch) -> None:
        args, kwargs = model_inputs(model, batch, self._home)
        calls: list[Call] = []
        between: tuple[Tensor, int] | None = None  # what a block returned, and its version
        # Where a model may be anybody's, one pass goes on to its end, for blocks that run again.
        ends = bool(self._calls) or hasattr(model, "get_output_embeddings")

        def recorder(number: int) -> Any:
            def record(*args: Any, **kwargs: Any) -> Any:
                nonlocal between
                hidden, call = _without_hidden(args, kwargs)
                call = Call(_to(call.args, self.device), _to(call.kwargs, self.device), call.key)
                if number == 0 and not calls:
                    self._put_first(hidden)
                elif number != len(calls) or between is None or not _same(hidden, *between):
                    raise _no_chain(number)
                between = hidden, _version(hidden)
                calls.append(self._shared(number, call))
                if ends and number == len(self.blocks) - 1:
                    raise Stop
                entries = self._entries.get(number)
                return hidden if entries is None else (hidden, *[None] * (entries - 1))

            return record

        with ExitStack() as stack:
            stack.enter_context(without_cache(model))
            for number, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, recorder(number)))
            try:
                model(*args, **kwargs)
            except Stop:
                pass
            except GrailError:
                raise
            except Exception as error:
                # Blocks that pass on what they got may leave the next layer another shape.
                if ran_out(error) or not calls:
                    raise
                if len(calls) < len(self.blocks):
                    raise _no_chain(len(calls)) from error
        if len(calls) < len(self.blocks):
            raise ModelError(
                f"block {len(calls)} of {len(self.blocks)} does not run; find the sites by "
                "sites=grail.trace(model), or name them: sites=[grail.Site(…)]"
            )
        self._calls.append(calls)
        self.masks.append(masks_of(model, args, kwargs).cpu())

    def _learn_entries(self, model: nn.Module, batch: Batch) -> bool:
        """Runs a model on one batch to see which of its blocks return tuples; whether any does."""
        with suppress(Exception):  # the first error says what is wrong
            outputs = self._outputs(model, batch)
            self._entries = {
                number: len(output)
                for number, output in enumerate(outputs)
                if isinstance(output, tuple)
            }
        return bool(self._entries)

    def _outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Runs the whole model and returns the outputs of its blocks."""
        args, kwargs = model_inputs(model, batch, self._home)
        found: list[Any] = []
        with ExitStack() as hooks:
            hooks.enter_context(without_cache(model))
            for block in self.blocks:
                hear = block.register_forward_hook(lambda _, __, output: found.append(output))
                hooks.callback(hear.remove)
            model(*args, **kwargs)
        return found

    def require_chain(self, model: nn.Module, batch: Batch) -> None:
        """Runs the blocks one by one on the first batch, and the whole model on it.

        Raises:
            ModelError: they differ, because blocks hand on more than hidden states.
        """
        outputs = self._outputs(model, batch)
        hidden = self.hidden[0].to(self.device, copy=True)
        for number, call in enumerate(self._calls[0]):
            hidden = self._run(hidden, number, call)
        expected = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
        tolerance = 4 * torch.finfo(hidden.dtype).eps ** 0.5
        if len(outputs) != len(self.blocks) or not torch.allclose(
            hidden, expected.to(hidden), rtol=tolerance, atol=tolerance, equal_nan=True
        ):
            raise ModelError(
                "blocks run one by one give other hidden states than the whole model, so they "
                "pass on more than hidden states; find the sites by sites=grail.trace(model), or "
                "name them: sites=[grail.Site(…)]"
            )

    def _put_first(self, hidden: Tensor) -> None:
        """Keeps the hidden states of one batch more."""
        self.hidden.put(len(self._calls), hidden)
        if self._room is not None:
            self._room -= hidden.nbytes
            if self._room < 0:
                self.rest_on(torch.device("cpu"))
                self._room = None

    def _shared(self, number: int, call: Call) -> Call:
        """The first batch's call where this one equals it, so that equal tables are held once."""
        if not self._calls:
            return call
        first = self._calls[0][number]
        pairs = ((call.args, first.args), (call.kwargs, first.kwargs), (call.key, first.key))
        return first if all(_equal(a, b) for a, b in pairs) else call


class OutputCache:
    """Outputs of modules that the next pass over the same batches would only compute again.

    Of a tuple only the first entry is kept: attention's second, its weights [B, heads, L, L], is
    dropped by the blocks of transformers too. A module of another library that returns more runs
    again.

    Args:
        modules: whose outputs are kept.
        stream: the batches.
        shelves: of an earlier memo, whose memory is used again.
    """

    def __init__(
        self, modules: Sequence[nn.Module], stream: Stream, shelves: Sequence[HiddenStates] = ()
    ):
        self._modules, self._stream = modules, stream
        new = [HiddenStates(stream.storage) for _ in modules[len(shelves) :]]
        self.shelves = [*shelves, *new]
        self._entries: dict[nn.Module, int] = {}  # of a tuple that a module returns
        self._runs_again: set[nn.Module] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what the modules return."""
        with ExitStack() as stack:
            for module, shelf in zip(self._modules, self.shelves, strict=False):
                keep = partial(self._keep, shelf, itertools.count())
                stack.callback(module.register_forward_hook(keep).remove)
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Lets the modules return what was kept, in the same order, each once."""
        with ExitStack() as stack:
            for module, shelf in zip(self._modules, self.shelves, strict=False):
                if module in self._runs_again:
                    continue
                replay = partial(self._next, module, iter(shelf))
                stack.enter_context(replaced_forward(module, replay))
            yield

    def _next(self, module: nn.Module, kept: Iterator[Tensor], *args: Any, **kwargs: Any) -> Any:
        # A copy: what reads it may write over it, and it may be replayed again.
        output = next(kept).to(self._stream.device, copy=True)
        if module not in self._entries:
            return output
        return (output, *(None for _ in range(self._entries[module] - 1)))

    def _keep(
        self, shelf: HiddenStates, batches: Iterator[int], module: nn.Module, args: Any, output: Any
    ) -> None:
        if isinstance(output, tuple):
            self._entries[module] = len(output)
            others = any(entry is not None for entry in output[1:])
            if others and not type(module).__module__.startswith("transformers."):
                self._runs_again.add(module)
            output = output[0]
        shelf.put(next(batches), output)


def _no_chain(block: int) -> ModelError:
    return ModelError(
        f"something runs between block {block} and the one before it, or a block runs again, so "
        "blocks cannot be run one by one; find the sites by sites=grail.trace(model), or name "
        "them: sites=[grail.Site(…)]"
    )


def _same(tensor: Tensor, other: Tensor, version: int) -> bool:
    """Whether a tensor is another one, unchanged since it had that version."""
    return tensor is other and _version(tensor) == version


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; torch does not count that of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Lets a module run another function in place of its forward."""
    had = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had


def model_inputs(
    model: nn.Module, batch: Batch, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model's forward."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        args = tuple(batch)
    elif isinstance(batch, Tensor):
        args = (batch,)
    else:
        raise InputError(
            "a batch must be a tensor (token ids [B, L], images [B, C, H, W]), a tuple of the "
            f"model's arguments, or a mapping of its keyword arguments; got {type(batch).__name__}"
        )
    _require_samples(batch)
    signature = inspect.signature(model.forward)
    known = signature.parameters
    if isinstance(batch, Tensor) and "input_ids" in known:
        if batch.dim() != 2 or batch.is_floating_point():
            raise InputError(
                f"a batch of token ids must be integers [B, L]; "
                f"got {batch.dtype} {tuple(batch.shape)}"
            )
        args, kwargs = (), {"input_ids": batch}
    check_token_ids(model, kwargs or args)
    if kwargs.get("past_key_values") is not None:
        raise InputError(
            "a batch holds past_key_values, which the model would write to; leave them out"
        )
    if "use_cache" in known or "use_cache" in kwargs:
        kwargs = {**kwargs, "use_cache": False}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{type(model).__name__} does not take this batch: {error}. A tuple holds the model's "
            "arguments in order, a mapping its keyword arguments; leave labels out"
        ) from error
    return _to(args, device), _to(kwargs, device)


def _require_samples(batch: Batch) -> None:
    """Refuses a batch of tensors that are not dense, or have no axis of samples."""
    given = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        require_dense("a batch", tensor)
    if tensors and not any(tensor.dim() for tensor in tensors):
        raise InputError(
            "a batch must have its samples along the first axis of a tensor; got a tensor without "
            "axes"
        )


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """A block's hidden states, its first tensor that is no mask, and the rest of its arguments."""
    if args:
        return args[0], Call(args[1:], kwargs)
    tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    key = next((name for name in tensors if "mask" not in name), tensors[0])
    rest = {name: value for name, value in kwargs.items() if name != key}
    return kwargs[key], Call((), rest, key)


def _to(tree: Any, device: torch.device) -> Any:
    """The same with tensors on a device, and none that only inference mode may write to."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device)
        return tensor.clone() if tensor.is_inference() else tensor

    return tree_map_only(Tensor, moved, tree)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, bool, str)) and a == b)
