"""Records what a model's own forward calls each of its blocks with.

Every block is replaced by a function that notes its arguments and returns its hidden states as they
came, so recording a batch costs an embedding and the masks.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grail.calibrate.recorded import Call, split_call, without_cache
from grail.errors import GrailError, ModelError
from grail.runtime.hooks import Stop, replaced_forward
from grail.runtime.memory import ran_out


class Recorder:
    """Records batches one after the other; equal calls of a block share their tensors.

    Args:
        model: whose forward is called.
        blocks: the model's blocks in order; the model itself is a block, too.
        device: where the recorded arguments are kept.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device):
        self.model, self.blocks, self.device = model, blocks, device
        self.first: list[Call] = []  # the first batch's calls, by block
        self.tuple_lengths: dict[int, int] = {}  # of the blocks that return a tuple

    def record(
        self, args: Sequence[Any], kwargs: dict[str, Any], keep: Callable[[Tensor], None]
    ) -> list[Call]:
        """Records one batch; returns the call of each block.

        Args:
            args, kwargs: of the model's forward.
            keep: called with the hidden states at the first block's entry.

        Raises:
            ModelError: blocks that do not run one right after the other.
        """
        calls = _Recording(self, keep).run(args, kwargs)
        self.first = self.first or calls
        return calls

    def learn_tuples(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Runs a batch to learn which blocks return tuples; returns whether any does."""
        with suppress(Exception):  # the first recording's error names the cause
            outputs = block_outputs(self.model, self.blocks, args, kwargs)
            for number, output in enumerate(outputs):
                if isinstance(output, tuple):
                    self.tuple_lengths[number] = len(output)
        return bool(self.tuple_lengths)


class _Recording:
    """The calls of one batch."""

    def __init__(self, recorder: Recorder, keep: Callable[[Tensor], None]):
        self._recorder, self._keep = recorder, keep
        self._calls: list[Call] = []
        self._passed: tuple[Tensor, int] | None = None  # what a block returned, and its version
        # Of a model of unknown origin the first batch runs to its end, for blocks that run again.
        self._stops = bool(recorder.first) or hasattr(recorder.model, "get_output_embeddings")

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
        recorder, blocks = self._recorder, self._recorder.blocks
        with ExitStack() as stack:
            stack.enter_context(without_cache(recorder.model))
            for number, block in enumerate(blocks):
                stack.enter_context(replaced_forward(block, partial(self._call, number)))
            try:
                recorder.model(*args, **kwargs)
            except Stop:
                pass
            except GrailError:
                raise
            except Exception as error:
                # Blocks that return what they got may leave the next layer another shape.
                if ran_out(error) or not self._calls:
                    raise
                if len(self._calls) < len(blocks):
                    raise _no_chain(len(self._calls)) from error
        if len(self._calls) < len(blocks):
            raise ModelError(
                f"block {len(self._calls)} of {len(blocks)} does not run; find the sites by "
                "sites=grail.trace(model), or name them: sites=[grail.Site(…)]"
            )
        return self._calls

    def _call(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Runs instead of a block's forward."""
        recorder = self._recorder
        hidden, call = split_call(args, kwargs)
        call = call.to(recorder.device)
        if number == 0 and not self._calls:
            self._keep(hidden)
        elif number != len(self._calls) or not self._was_passed(hidden):
            raise _no_chain(number)
        self._passed = hidden, _version(hidden)
        first = recorder.first
        self._calls.append(first[number] if first and call.equals(first[number]) else call)
        if self._stops and number == len(recorder.blocks) - 1:
            raise Stop
        length = recorder.tuple_lengths.get(number)
        return hidden if length is None else (hidden, *[None] * (length - 1))

    def _was_passed(self, hidden: Tensor) -> bool:
        """Returns True for the hidden states that the block before returned, unchanged."""
        if self._passed is None:
            return False
        tensor, version = self._passed
        return hidden is tensor and _version(tensor) == version


def block_outputs(
    model: nn.Module, blocks: Sequence[nn.Module], args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Any]:
    """Runs the whole model; returns the outputs of its blocks."""
    outputs: list[Any] = []
    with ExitStack() as hooks:
        hooks.enter_context(without_cache(model))
        for block in blocks:
            note = block.register_forward_hook(lambda _, __, output: outputs.append(output))
            hooks.enter_context(note)
        model(*args, **kwargs)
    return outputs


def _version(tensor: Tensor) -> int:
    """Returns the count of in-place changes; torch counts none of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _no_chain(block: int) -> ModelError:
    return ModelError(
        f"something runs between block {block} and the one before it, or a block runs again, so "
        "blocks cannot be run one by one; find the sites by sites=grail.trace(model), or name "
        "them: sites=[grail.Site(…)]"
    )
