"""Hooks at a calibration point: what its consumers read, and what the network then holds."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from grail.networks import CalibrationPoint
from grail.networks.layers import Consumer, Routed

# Called as a `Reader` of each consumer.
Read = Callable[[Consumer, Tensor, Routed | None], None]
Observe = Callable[[Tensor], None]


@contextmanager
def watch(
    point: CalibrationPoint, block: nn.Module, read: Read | None, observe: Observe | None
) -> Iterator[None]:
    """Calls functions with what a point's consumers read, and with what its probe shows after.

    Args:
        point: of the block.
        block: the point's.
        read: called for each consumer; without it experts are observed even if they get no token.
        observe: called for each time that the probe's module runs after a consumer.
    """
    with ExitStack() as hooks:
        _Watch(point, read, observe).attach(block, hooks)
        yield


class _Watch:
    """The hooks of one point. The probe's module may also run before a consumer does."""

    def __init__(self, point: CalibrationPoint, read: Read | None, observe: Observe | None):
        self._point, self._read, self._observe = point, read, observe
        self._reads = read is not None or point.group is None
        self._observes = not self._reads  # from here on

    def attach(self, block: nn.Module, hooks: ExitStack) -> None:
        for consumer in self._point.consumers if self._reads else ():
            hooks.enter_context(consumer.watch(partial(self._consumed, consumer)))
        probe = self._point.probe
        if self._observe is None or probe is None:
            return
        module = probe.module or block
        if probe.module is None or probe.output:
            hook = module.register_forward_hook(lambda _, __, output: self._shown(output))
        else:
            hook = module.register_forward_pre_hook(lambda _, args: self._shown(args))
        hooks.enter_context(hook)

    def _consumed(self, consumer: Consumer, x: Tensor, routed: Routed | None) -> None:
        self._observes = True
        if self._read is not None:
            self._read(consumer, x, routed)

    def _shown(self, shown: Any) -> None:
        if self._observes and self._observe is not None:
            self._observes = not self._reads
            self._observe(shown[0] if isinstance(shown, tuple) else shown)
