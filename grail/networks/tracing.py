"""The tracer of `grail.networks.channel_graph`: torch.fx, down to layers.

With an example it runs the network while it traces it, so that control flow can depend on sizes and
values: `if height % 2:` goes the way of the example.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from grail.algebra.kinds import INSTANCE_NORMS, MAPS, NORMS


class Tracer(fx.Tracer):
    """Traces down to modules without children.

    Args:
        opens: whether modules without children are traced, too, where they have parameters of
            their own and are not torch's, such as a layer scale.
        example: arguments, and those by name, with which everything is computed.

    Attributes:
        values: what each node returns for the example; empty without.
    """

    def __init__(
        self, opens: bool = False, example: tuple[Sequence[Any], Mapping[str, Any]] | None = None
    ):
        super().__init__()
        self._opens, self._example = opens, example
        self._given: dict[str, Tensor] = {}  # of the example, by placeholder
        self._computes = False
        self.values: dict[fx.Node, Any] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Calls the network as the example does; its tensors become placeholders."""
        if self._example is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        args, kwargs = self._example

        def called(root: nn.Module, *_: Any) -> Any:
            given = [self._placeholder(f"argument_{n}", arg) for n, arg in enumerate(args)]
            named = {name: self._placeholder(name, arg) for name, arg in kwargs.items()}
            return root_fn(root, *given, **named)

        return called, [self.root]

    def _placeholder(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        self._given[name] = value
        return self.create_proxy("placeholder", name, (), {})

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, NORMS):
            return True
        if not self._opens:
            return next(m.children(), None) is None
        if isinstance(m, (*MAPS, *INSTANCE_NORMS, nn.MultiheadAttention)):
            return True
        own = any(True for _ in m.parameters(recurse=False))
        return next(m.children(), None) is None and (not own or _is_of_torch(m))

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(kind, *args, **kwargs)
        if self._example is not None and isinstance(proxy, fx.Proxy):
            self._compute(proxy.node)
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self._example is None else _Computed(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node in self.values:
            return bool(self.values[obj.node])
        return super().to_bool(obj)

    def iter(self, obj: Any) -> Iterator[Any]:
        value = self.values.get(obj.node)
        if isinstance(value, (tuple, list, torch.Size)):
            return iter([obj[number] for number in range(len(value))])
        return super().iter(obj)

    def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._computes:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if self._computes:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _compute(self, node: fx.Node) -> None:
        """Computes what a node returns for the example."""
        values = self.values

        def value(argument: fx.Node) -> Any:
            if argument not in values:  # a tensor that became an attribute of the network
                values[argument] = self._result(argument, (), {})
            return values[argument]

        self._computes = True
        try:
            args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
            values[node] = self._result(node, args, kwargs)
        finally:
            self._computes = False

    def _result(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            return self._given[str(node.target)]
        if node.op == "get_attr":
            value: Any = self.root
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        return args[0]


class _Computed(fx.Proxy):
    """A proxy that can be a number where Python needs one, as in `range(x.size(0))`."""

    tracer: Any

    def __len__(self) -> int:
        return len(self.tracer.values[self.node])

    def __index__(self) -> int:
        return int(self.tracer.values[self.node])

    def __int__(self) -> int:
        return int(self.tracer.values[self.node])

    def __float__(self) -> float:
        return float(self.tracer.values[self.node])


def _is_of_torch(module: nn.Module) -> bool:
    """Returns whether a module is torch's own, or of a class made from one."""
    kinds = (kind for kind in type(module).__mro__ if kind is not nn.Module)
    return any(kind.__module__.startswith("torch.nn.") for kind in kinds)
