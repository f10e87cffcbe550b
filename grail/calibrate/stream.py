"""The calibration set on its way through the model, from block to block.

The model's forward runs once for each batch, to record what its blocks are called with (see
`grail.calibrate.recorder`): position embeddings, and masks that differ by layer, are whatever the
library passes. Blocks are then run one at a time by their own forward with those arguments.
"""

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from math import ceil
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from grail.arguments import require_batches, require_usable
from grail.calibrate.batches import Batch, model_inputs
from grail.calibrate.hidden_states import HiddenStates
from grail.calibrate.recorded import Call
from grail.calibrate.recorder import Recorder, block_outputs
from grail.calibrate.samples import Change, Masks, changed_arguments, masks_of
from grail.errors import EmptyCalibrationError, InputError, ModelError
from grail.runtime.processes import Processes

HELD_OUT_EVERY = 5  # sequences: one of so many is held out


class Role(Enum):
    """The purpose of a sample.

    train      fits weights and, unless there are samples for it, selects channels
    held_out   chooses α and β, then joins the fit
    guard      chooses α and β, and is never fitted
    select     selects channels, and nothing else
    """

    TRAIN = "train"
    HELD_OUT = "held_out"
    GUARD = "guard"
    SELECT = "select"


class Stream:
    """Hidden states of every batch at the entry of one block.

    Args:
        model: called as `model(**batch)`, `model(*batch)` or `model(batch)`.
        blocks: the model's blocks in order; the model itself is a block, too.
        batches: LongTensor [B, L] of token ids, other tensors with samples along the first axis
            (images [B, C, H, W]), tuples of the model's arguments, or mappings of its keyword
            arguments, of which an `attention_mask` [B, L] marks the tokens that count.
        storage: where hidden states wait between blocks; the model may be elsewhere.
        processes: share the batches; each runs some of them.
        device: where the blocks run; default where the model is.
        room: bytes that hidden states may take in `storage`; beyond, all of them move to the CPU.
        others: batches with another purpose than the calibration's, by role.

    `tokens`: of the calibration, how many count, in all processes; samples, where a sample has no
    tokens (images). `tokens_by_role`: of the others. `own_tokens`: all of this process.
    `samples`: sequences or images of the calibration, in all processes. `holds_out`: whether any of
    them is held out. `others`: the roles of other batches.

    Raises:
        EmptyCalibrationError: no batch, or no token, of the calibration or another role.
        InputError: a batch that the model does not take; fewer batches than processes.
        ModelError: blocks that do not run one right after the other.
    """

    tokens: int
    own_tokens: int
    samples: int
    holds_out: bool
    others: frozenset[Role] = frozenset()
    tokens_by_role: Mapping[Role, int] = MappingProxyType({})

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Iterable[Batch],
        storage: torch.device | str = "cpu",
        processes: Processes | None = None,
        device: torch.device | None = None,
        room: int | None = None,
        others: Mapping[Role, Iterable[Batch]] = MappingProxyType({}),
    ):
        require_batches(batches)
        self.blocks, self.storage = blocks, require_usable(storage)
        self.processes, self._room = processes or Processes(), room
        self._home = next(model.parameters()).device
        self.device = device or self._home
        self.hidden = HiddenStates(self.storage)
        self._has_room = True
        self._observed: list[HiddenStates] = []
        self.masks: list[Masks] = []  # on the CPU, where reading one stalls no GPU
        self._calls: list[list[Call]] = []
        self._kinds: list[Role] = []  # of batches; some samples of TRAIN are held out
        self.others = frozenset(others)
        recorder = Recorder(model, blocks, self.device)
        for kind, batch in self.processes.share(_with_roles(batches, others)):
            self._kinds.append(kind)
            try:
                self._enter(recorder, batch)
            except ModelError:
                inputs = model_inputs(model, batch, self._home)
                if self._calls or not recorder.learn_tuples(*inputs):
                    raise
                self._enter(recorder, batch)
                self.require_chain(model, batch)
        self._count()

    def _enter(self, recorder: Recorder, batch: Batch) -> None:
        """Records one batch and keeps its hidden states."""
        args, kwargs = model_inputs(recorder.model, batch, self._home)
        keep = partial(self.hidden.put, len(self))
        self._calls.append(recorder.record(args, kwargs, keep))
        self.masks.append(masks_of(recorder.model, args, kwargs).cpu())
        if self._room is not None:
            self._room -= self.hidden[len(self) - 1].nbytes
            if self._room < 0:
                self.rest_on(torch.device("cpu"))
                self._room = None

    def _count(self) -> None:
        """Counts the tokens and samples of all processes, and refuses too few."""
        own = range(len(self))
        self.own_tokens = sum(map(self.tokens_of, own))
        counts = {
            kind: sum(self.tokens_of(batch) for batch in own if self._kinds[batch] is kind)
            for kind in (Role.TRAIN, *sorted(self.others, key=lambda role: role.value))
        }
        total = self.processes.total(torch.tensor(list(counts.values()), dtype=torch.int64))
        found = dict(zip(counts, total.tolist(), strict=True))
        counting = self.processes.interleaved(
            [(self._kinds[batch], self._counting(batch)) for batch in own]
        )
        for kind, tokens in found.items():
            if tokens == 0:
                name = "calibration" if kind is Role.TRAIN else f"{kind.value} text"
                raise EmptyCalibrationError(
                    f"{name} holds no token; pass at least one batch of token ids"
                )
        if len(counting) < self.processes.count:
            raise InputError(
                f"{self.processes.count} processes share {len(counting)} batches: pass at "
                "least one for each, smaller ones if need be"
            )
        self.tokens, self.tokens_by_role = found.pop(Role.TRAIN), MappingProxyType(found)
        fitted = [samples for kind, samples in counting if kind is Role.TRAIN]
        held_out = iter(_every_fifth(fitted))
        self.samples = sum(map(len, fitted))
        every = [
            next(held_out) if kind is Role.TRAIN else torch.zeros_like(samples)
            for kind, samples in counting
        ]
        self.holds_out = any(bool(held.any()) for held in every)
        self._held_out = tuple(self.processes.share(every))

    def _counting(self, batch: int) -> Tensor:
        """Returns [B] bool on the CPU, the samples of one batch with a token that counts."""
        mask, samples = self.masks[batch].tokens, len(self.hidden[batch])
        return torch.ones(samples, dtype=torch.bool) if mask is None else mask.any(1)

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, block: int, batch: int) -> Any:
        """Returns the block's output for one batch, on the device of the blocks.

        Raises:
            ModelError: the block changes an argument that every pass needs unchanged.
        """
        # A block may write on its input.
        hidden = self.hidden[batch].to(self.device, copy=True)
        return self._run(hidden, block, self._calls[batch][block])

    def run_changed(self, block: int, batch: int, change: Change) -> Any:
        """Returns the block's output for one batch, with every tensor argument changed."""
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
        """Replaces one batch's hidden states with those at the next block's entry."""
        self.hidden.put(batch, hidden)

    def rest_on(self, storage: torch.device) -> None:
        """Moves hidden states to another storage."""
        if storage != self.storage:
            self.hidden, self.storage = self.hidden.copy(storage), storage

    @property
    def keeps_inputs(self) -> bool:
        """Whether what a layer reads may be kept of every batch, as wide as a block's widest layer.

        Only where blocks run: another device sends it back later than it is computed again.
        """
        return self._has_room and self.storage.type == self.device.type

    def forbid_inputs(self) -> None:
        """Forbids to keep what layers read, for want of room."""
        self._has_room = False

    def observed(self, number: int) -> HiddenStates:
        """Returns the memory for what is observed within a block; every block uses it again."""
        while len(self._observed) <= number:
            self._observed.append(HiddenStates(self.storage))
        return self._observed[number]

    def mask(self, batch: int, decoder: bool = False, length: int | None = None) -> Tensor | None:
        """Returns [B, L] bool on the device of the blocks, or None where every token counts.

        Args:
            batch: its number.
            decoder: whether the mask is for a layer of an encoder-decoder's decoder.
            length: L where the layer reads it, which may be shorter than the model's input.
        """
        mask = self.masks[batch].of(decoder, length)
        return None if mask is None else mask.to(self.device)

    def output_mask(self, batch: int) -> Tensor | None:
        """Returns [B, L] bool on the device of the blocks, the network's output that counts."""
        mask = self.masks[batch].of_output
        return None if mask is None else mask.to(self.device)

    def tokens_of(self, batch: int) -> int:
        """Returns the number of a batch's tokens that count; of its samples, if they have none."""
        mask, hidden = self.masks[batch].tokens, self.hidden[batch]
        if mask is not None and self.has_sequences(hidden):
            return int(mask.sum())
        return hidden.shape[: 1 + self.has_sequences(hidden)].numel()

    @property
    def is_masked(self) -> bool:
        """Whether any batch has tokens that do not count."""
        masks = itertools.chain(*((m.tokens, m.decoder) for m in self.masks))
        return any(mask is not None for mask in masks)

    @staticmethod
    def has_sequences(hidden: Tensor) -> bool:
        """Returns True for hidden states with an axis of tokens: [B, L, _], or token ids [B, L]."""
        return hidden.dim() == 3 or (hidden.dim() == 2 and not hidden.is_floating_point())

    def held_out(self, batch: int) -> Tensor | None:
        """Returns [B] bool on the CPU: each fifth sequence of all is held out; of fewer, the last.

        Sequences without a token that counts are skipped. None where the batch has none held out.
        """
        held = self._held_out[batch]
        return held if bool(held.any()) else None

    def fits(self, batch: int) -> bool:
        """Returns whether a batch is of the calibration; no other text is ever fitted."""
        return self._kinds[batch] is Role.TRAIN

    def by_role(self, batch: int, holds_out: bool) -> dict[Role, Tensor | None]:
        """Returns the samples of each role in a batch, [B] bool on the CPU; None is all of them.

        Args:
            holds_out: whether samples are held out at all; else those are fitted, too.
        """
        kind, held = self._kinds[batch], self.held_out(batch) if holds_out else None
        if held is None:
            return {kind: None}
        if bool(held.all()):
            return {Role.HELD_OUT: None}
        return {kind: ~held, Role.HELD_OUT: held}

    @property
    def chooses(self) -> bool:
        """True if some samples are held out, or are guard text: they choose an automatic α or β."""
        return self.holds_out or Role.GUARD in self.others

    @property
    def selecting(self) -> Role:
        """The role of the samples that select channels."""
        return Role.SELECT if Role.SELECT in self.others else Role.TRAIN

    @property
    def batches(self) -> list[int]:
        """The numbers of the batches whose hidden states it holds: all, or those of its fork."""
        return self.hidden.batches

    @property
    def held(self) -> list[HiddenStates]:
        """The hidden states at the entry of its block and those observed within."""
        return [self.hidden, *self._observed]

    def fork(self, share: float = 1.0) -> "Stream":
        """Returns a second stream at the same block, which moves separately.

        Args:
            share: of the batches that it holds, see `spread`.
        """
        other = copy.copy(self)
        batches = None if share == 1 else self.spread(share)
        other.hidden, other._observed = self.hidden.copy(batches=batches), []
        return other

    def spread(self, share: float) -> list[int]:
        """Returns about a share of this process's batches, spread evenly over those of all.

        Batches of each role, with sequences held out, with others, and with both are chosen from
        separately, at least one of each in all processes, so that the share of each stays.
        """
        kinds = self.processes.interleaved([self._kind(batch) for batch in range(len(self))])
        seen: Counter[tuple[Role, bool, bool]] = Counter()
        chosen = []
        for kind in kinds:
            chosen.append(ceil((seen[kind] + 1) * share) > ceil(seen[kind] * share))
            seen[kind] += 1
        return [batch for batch, takes in enumerate(self.processes.share(chosen)) if takes]

    def _kind(self, batch: int) -> tuple[Role, bool, bool]:
        """Returns a batch's role, whether it has sequences held out, and others that count."""
        held = self._held_out[batch]
        others = bool((self._counting(batch) & ~held).any())
        return self._kinds[batch], bool(held.any()), others

    def part(self, batches: Sequence[int]) -> "Stream":
        """Returns a stream of some batches of this process alone; a batch may come twice."""
        other = copy.copy(self)
        other.processes, other.hidden, other._observed = Processes(), HiddenStates(self.storage), []
        for number, batch in enumerate(batches):
            other.hidden.put(number, self.hidden[batch])
        other.masks = [self.masks[batch] for batch in batches]
        other._calls = [self._calls[batch] for batch in batches]
        other._held_out = tuple(self._held_out[batch] for batch in batches)
        other._kinds = [self._kinds[batch] for batch in batches]
        return other

    def require_chain(self, model: nn.Module, batch: Batch) -> None:
        """Runs the blocks one by one on the first batch, and the whole model on it.

        Raises:
            ModelError: they differ, because blocks pass on more than hidden states.
        """
        outputs = block_outputs(model, self.blocks, *model_inputs(model, batch, self._home))
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


def held_out_step(samples: int) -> int:
    """Returns the distance of held-out samples, counted from 1; 1 if none is held out."""
    return max(1, min(HELD_OUT_EVERY, samples))


def _with_roles(
    calibration: Iterable[Batch], others: Mapping[Role, Iterable[Batch]]
) -> Iterator[tuple[Role, Batch]]:
    """Yields each batch with its role."""
    for kind, batches in {Role.TRAIN: calibration, **others}.items():
        for batch in batches:
            yield kind, batch


def _every_fifth(counting: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns [B] bool for each batch, the samples that are held out among those that count."""
    counts = torch.cat(list(counting))
    step = held_out_step(int(counts.sum()))
    held = counts & (counts.cumsum(0) % step == 0) & (step > 1)
    return held.split([len(of_batch) for of_batch in counting])
