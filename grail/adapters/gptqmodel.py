"""GPTQModel: its `GPTQ` class accumulates a packed Gram for each device, instead of H.

    from grail.adapters import gptqmodel
    with gptqmodel.installed():
        model.quantize(calibration)

Counts, lock, events and the merge of devices stay those of GPTQModel; see docs/adapters.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from grail.adapters._library import Library, attached
from grail.algebra.gram import Gram
from grail.algebra.kinds import columns, tokens_read
from grail.algebra.sums import as_activations
from grail.errors import AdapterError

LIBRARY = Library("gptqmodel", ("7.6.0",))
_gptq: Any = LIBRARY.module("gptqmodel.quantization.gptq")
_GPTQ: Any = LIBRARY.attribute(_gptq, "GPTQ")

# Methods of GPTQ that the adapter calls, or whose work it does.
_METHODS = (
    *("process_batch", "compute_hessian_xtx", "_select_hessian_target_device"),
    *("_wait_partial_ready", "_record_partial_ready", "_wait_hessian_ready"),
    *("_record_hessian_ready", "_defer_hessian_sources", "_reap_deferred_hessian_sources"),
)
# Attributes of an object of GPTQ that it reads and writes.
_STATE = (
    *("module", "columns", "H", "nsamples", "fwd_counter", "lock", "_device_sample_counts"),
    *("_device_hessian_partials", "_device_hessian_partial_ready", "_hessian_dirty"),
    "_final_hessian_device_hint",
)
# Its sums, which a class that overrides one of these forms in another way.
_SUMS = ("process_batch", "compute_hessian_xtx")

# Tokens. At 576 channels pieces of 512 take 8% longer than 2048 tokens at once, those of 288 22%.
_LEAST_PIECE = 512

_stock_add_batch: Any = LIBRARY.attribute(_GPTQ, "add_batch")
_stock_materialize: Any = LIBRARY.attribute(_GPTQ, "materialize_global_hessian")
_stock_sums = {name: LIBRARY.attribute(_GPTQ, name) for name in _SUMS}
_tasks: "weakref.WeakSet[Any]" = weakref.WeakSet()  # objects of GPTQ that may have Grams
_tasks_lock = threading.Lock()


def install() -> Callable[[], None]:
    """Attaches to GPTQModel in this process; returns a function that detaches.

    Hessians that were begun before stay those of GPTQModel. Those that were begun with Grams become
    dense when the adapter is detached, so that no token is lost.

    Raises:
        AdapterError: it is attached already, or this version lacks what it attaches to.
    """
    for name in _METHODS:
        LIBRARY.attribute(_GPTQ, name)
    LIBRARY.attribute(_gptq, "_device_reduction_key")
    replacements = (
        (_GPTQ, "add_batch", _add_batch),
        (_GPTQ, "materialize_global_hessian", _materialize),
    )
    undo = ExitStack()
    undo.callback(_make_dense)
    undo.enter_context(LIBRARY.replacing(*replacements))
    return undo.close


def installed() -> AbstractContextManager[None]:
    """Attaches to GPTQModel inside of a `with` block; see `install`."""
    return attached(install)


def _add_batch(task: Any, inp: Tensor, out: Any, batch_index: int | None = None) -> None:
    """Adds a layer's input to the Gram of its device: `GPTQ.add_batch`."""
    if not isinstance(task.module, nn.Embedding):
        _require_known(task)
        x = tokens_read(task.module, inp.detach())
        with task.lock:
            if not _has_dense_sums(task):
                _count(task, as_activations(x))
                return
    _stock_add_batch(task, inp, out, batch_index)


def _count(task: Any, x: Tensor) -> None:
    """Adds tokens [..., columns] to a task."""
    tokens = x.shape[:-1].numel()
    if not tokens:
        return
    device = _added(task, x)
    task._record_partial_ready(device)
    counts = task._device_sample_counts
    counts[device] = counts.get(device, 0) + tokens
    task.fwd_counter += 1
    task.nsamples += tokens
    task._hessian_dirty = True


def _added(task: Any, x: Tensor) -> torch.device:
    """Adds tokens to the Gram of a device, which is made if there is none; returns the device."""
    grams, device = task._device_hessian_partials, x.device
    gram = grams.get(device)
    if gram is None:
        try:
            gram = _empty_gram(task, device)
        except torch.OutOfMemoryError:  # GPTQModel then sums up on the CPU, too
            _gptq.log.warn(f"{task.name}: no memory for its Gram on {device}; it is on the CPU")
            device, x = torch.device("cpu"), x.cpu()
            gram = grams.get(device) or _empty_gram(task, device)
    if device in grams:
        task._wait_partial_ready(device)
    for tokens in _pieces(x):
        gram.update(tokens)
    grams[device] = gram
    return device


def _pieces(x: Tensor) -> Sequence[Tensor]:
    """Returns tokens in pieces, so that the fp32 copy of 16-bit ones on a CPU stays small."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return (x,)
    channels = x.shape[-1]
    return x.reshape(-1, channels).split(max(_LEAST_PIECE, channels // 2))


def _empty_gram(task: Any, device: torch.device) -> Gram:
    # A buffer of tokens on a GPU would take more memory than the Gram saves. GPTQModel looks for
    # NaN in its loss.
    settings = {"name": task.name, "buffer": 0, "non_finite": "propagate"}
    return Gram.of(task.module, device=device, **settings)


def _require_known(task: Any) -> None:
    """Raises AdapterError for a task whose sums are formed in a way that the adapter bypasses."""
    with _tasks_lock:
        if task in _tasks:
            return
    for name in _STATE:
        LIBRARY.attribute(task, name)
    kind = type(task).__name__
    for name, stock in _stock_sums.items():
        if getattr(getattr(task, name), "__func__", None) is not stock:
            raise AdapterError(
                f"{kind}.{name} is not GPTQ.{name}, so grail does not know what {kind} sums up; "
                "quantise without the adapter"
            )
    own = task.columns - getattr(task, "_tp_pad_cols", 0)
    if columns(task.module) != own:
        raise AdapterError(
            f"{task.name} is a {type(task.module).__name__} whose weight has "
            f"{columns(task.module)} columns, and GPTQModel gives it {own}; quantise without the "
            "adapter"
        )
    with _tasks_lock:
        _tasks.add(task)


def _has_dense_sums(task: Any) -> bool:
    return any(isinstance(sums, Tensor) for sums in task._device_hessian_partials.values())


def _materialize(task: Any, target_device: torch.device | None = None) -> None:
    """Writes H = 2/tokens·Σ x xᵀ [columns, columns]: `GPTQ.materialize_global_hessian`."""
    with task.lock:
        if not task._device_hessian_partials or _has_dense_sums(task):
            _stock_materialize(task, target_device)
            return
        task._reap_deferred_hessian_sources()
        device = task._select_hessian_target_device(target_device)
        task._wait_hessian_ready(device)
        grams = _in_order(task, device)
        total = grams[0]
        if len(grams) > 1 or total.device != device:
            total = _empty_gram(task, device)
            for gram in grams:
                total.merge(gram)
        task.H = _hessian(task, total, device)
        task.nsamples = total.tokens
        task._hessian_dirty = False
        task._final_hessian_device_hint = task.H.device
        for state in ("partials", "partial_ready"):
            getattr(task, f"_device_hessian_{state}").clear()
        task._device_sample_counts.clear()
        task._record_hessian_ready(task.H.device)
        read = [gram.parts()["packed"] for gram in (*grams, total)]
        task._defer_hessian_sources(read, task._hessian_ready_event)


def _in_order(task: Any, device: torch.device) -> list[Gram]:
    """Returns the Grams of all devices in GPTQModel's order, once `device` may read them."""
    grams = task._device_hessian_partials
    for event in task._device_hessian_partial_ready.values():
        if event is not None and device.type == "cuda":
            torch.cuda.current_stream(device).wait_event(event)
        elif event is not None:
            event.synchronize()
    return [grams[place] for place in sorted(grams, key=_gptq._device_reduction_key)]


def _hessian(task: Any, gram: Gram, device: torch.device) -> Tensor:
    """Returns a task's H, in the memory of its last one where that fits."""
    size, own = task.columns, gram.channels
    H = task.H
    fits = H is not None and H.shape == (size, size) and H.dtype == torch.float32
    if not fits or H.device != device:
        H = torch.empty(size, size, dtype=torch.float32, device=device)
    if own < size:  # columns that pad the weight for tensor parallelism, which read zeros
        H.zero_()
    gram.hessian(per="token", scale=2, out=H[:own, :own])
    return H


def _make_dense() -> None:
    """Replaces Grams that wait by the dense sums of GPTQModel."""
    with _tasks_lock:
        begun = list(_tasks)
    for task in begun:
        with task.lock:
            grams = task._device_hessian_partials
            for device, gram in list(grams.items()):
                if isinstance(gram, Gram):
                    extra = task.columns - gram.channels
                    grams[device] = nn.functional.pad(gram.hessian(), (0, extra, 0, extra))
