"""The code that serves a Gram call, found once for every call of its form.

The form is all that does not depend on values: shapes, strides, dtypes, devices, the alignment of
pointers, the backend. What checks it and chooses a kernel runs at its first call; later calls look
it up. Overlaps in memory and offsets are checked at every call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from grail_kernels.backend import resolve_backend
from grail_kernels.checks import reach
from grail_kernels.gram_call import GramCall

# Forms that are kept; then all are found again.
_MOST_FORMS = 1024

# The bytes that a load of a kernel takes at most.
_WIDEST_LOAD = 16

# Adds the Gram matrices of a checked call, whose tensors lie at these addresses.
Add = Callable[[GramCall, Sequence[int]], None]


class Form(NamedTuple):
    """All that calls of a form share.

    Attributes:
        add: the code that serves them.
        apart: number and bytes of a tensor that is written, and of another of the call on its
            device: the two must not overlap.
    """

    add: Add
    apart: tuple[tuple[int, int, int, int], ...]


_FORMS: dict[Any, Form] = {}


def serve(call: GramCall) -> None:
    """Checks a call and adds its Gram matrices.

    Raises: as `grail_kernels.gram_`.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in call.tensors]
    key = (
        call.backend,
        *(
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            for tensor in call.tensors
        ),
        *(address % _WIDEST_LOAD == 0 for address in addresses),
    )
    form = _FORMS.get(key)
    if form is None:
        form, fits_others = _form_of(call)
        if len(_FORMS) >= _MOST_FORMS:
            _FORMS.clear()
        if fits_others:
            _FORMS[key] = form
    for one, bytes_of_one, other, bytes_of_other in form.apart:
        first, second = addresses[one], addresses[other]
        if first < second + bytes_of_other and second < first + bytes_of_one:
            call.check_overlap()  # names the two
    call.check_offsets()
    form.add(call, addresses)


def forget_forms() -> None:
    """Finds the code for every form again, as after a change of the launch table."""
    _FORMS.clear()


def _form_of(call: GramCall) -> tuple[Form, bool]:
    """The form of a call, whose shapes, dtypes and devices are checked; whether it fits others."""
    call.check_forms()
    sizes = [0 if tensor is None else reach(tensor) for tensor in call.tensors]
    written = [number for number, name in enumerate(call._fields) if name in call.targets]
    apart = tuple(
        (one, sizes[one], other, sizes[other])
        for position, one in enumerate(written)
        for other in range(len(sizes))
        if other not in written[: position + 1]
        and sizes[one]
        and sizes[other]
        and _device(call, one) == _device(call, other)
    )
    if resolve_backend(call.x, call.backend) == "torch":
        from grail_kernels.gram_torch import add_gram

        return Form(lambda call, _: add_gram(call), apart), True
    from grail_kernels.gram_launch import plan_of

    if call.offsets is None or call.offsets.device == call.out.device:
        plan = plan_of(call)
        return Form(plan, apart), plan.fits_others
    plan = plan_of(_with_offsets_there(call))

    def add(call: GramCall, addresses: Sequence[int]) -> None:
        moved = _with_offsets_there(call)
        assert moved.offsets is not None
        plan(moved, [*addresses[:-1], moved.offsets.data_ptr()])

    return Form(add, apart), plan.fits_others


def _with_offsets_there(call: GramCall) -> GramCall:
    """The call with its offsets on the device of the rest."""
    assert call.offsets is not None
    return call._replace(offsets=call.offsets.to(call.out.device))


def _device(call: GramCall, number: int) -> torch.device:
    tensor = call.tensors[number]
    assert tensor is not None
    return tensor.device
