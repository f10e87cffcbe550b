"""Sites that a person names, in any network."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from grail.algebra.width import Width
from grail.arguments import is_whole, plain
from grail.errors import InputError, ModelError
from grail.networks.configuration import has_configuration, not_held
from grail.networks.layers import Consumer, Producer
from grail.networks.site import Architecture, BoundSite, ResidualProbe, bind
from grail_kernels import check_kind


@dataclass(frozen=True)
class Fused:
    """A producer that writes several values for each channel of a site, as [gate; up] does.

    Args:
        name: of the layer; its H·parts rows are the parts one after the other, H rows each.
        parts: their number.
        interleaved: whether the parts alternate row by row instead.
    """

    name: str
    parts: int = 2
    interleaved: bool = False

    def __post_init__(self) -> None:
        check_kind("name", self.name, str, "the name of a layer")
        check_kind("interleaved", self.interleaved, bool, "True or False")
        object.__setattr__(self, "parts", plain(self.parts))
        if not is_whole(self.parts) or self.parts < 2:
            raise InputError(f"parts must be an integer of at least 2; got {self.parts!r}")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Site:
    """One hidden activation of a network, by the names of its layers (`model.named_modules()`).

    Args:
        producers: layers whose output channels are the site's; `Fused` for one that writes several
            values for each.
        consumers: layers that read all of them. Each of several is fitted to its own input. A
            linear layer can read a map of convolutions flattened channel by channel.
        along: layers in between that treat every channel separately and have parameters for each:
            batch norm, instance norm, depthwise convolutions, PReLU.
        name: for the report; default the first consumer's.

    A residual stream is a site, too: every layer that adds to it is a producer, every layer that
    reads it a consumer.
    """

    producers: Sequence[str | Fused]
    consumers: Sequence[str]
    along: Sequence[str] = ()
    name: str = ""

    def __post_init__(self) -> None:
        check_kind("name", self.name, str, "the name of a site")
        for field in ("producers", "consumers", "along"):
            names = getattr(self, field)
            if isinstance(names, (str, Fused)):
                one = f"the string {names!r}" if isinstance(names, str) else repr(names)
                raise InputError(f"{field} must be a list of names; got {one}")
            check_kind(field, names, Iterable, "a list of names")
            names = tuple(names)
            kinds = (str, Fused) if field == "producers" else str
            for name in names:
                check_kind(f"a name of {field}", name, kinds, "the name of a layer")
            object.__setattr__(self, field, names)
            if twice := _repeated(list(map(str, names))):
                raise InputError(f"{field} names {twice[0]!r} twice")
        if not self.producers or not self.consumers:
            raise InputError("a site needs the names of its producers and of its consumers")
        if both := [name for name in self.consumers if name in self.written]:
            raise ModelError(f"{both[0]} writes the channels that it reads; it cannot be narrowed")

    def __str__(self) -> str:
        return self.name or self.consumers[0]

    @property
    def written(self) -> tuple[str, ...]:
        """The names of the producers."""
        return tuple(map(str, self.producers))


class Named(Architecture):
    """Any network as one block, with the named sites.

    Each is calibrated after those before it in the list, which should be the order in which they
    run: the network runs once for each of them.
    """

    kinds = default = ("named",)
    trusted = False

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        self.name, self.blocks = type(model).__name__, [model]
        self._sites, self._modules = sites, dict(model.named_modules())
        names = [str(site) for site in sites]
        if _repeated(names):
            raise InputError(f"sites must have different names; got {', '.join(names)}")
        for field, does in (("written", "written"), ("along", "run along"), ("consumers", "read")):
            if twice := _repeated([name for site in sites for name in getattr(site, field)]):
                raise InputError(f"two sites are {does} by {twice[0]!r}; it can belong to one")
        self.sites(self.kinds)

    def sites(self, kinds: Sequence[str]) -> list[list[BoundSite]]:
        return [[self._bound(site) for site in self._sites]]

    def beyond_configuration(
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width]
    ) -> list[str]:
        found = list(dict.fromkeys(widths[site.name] for site in sites))
        reason = not_held("named", found, "site") if has_configuration(self.blocks[0]) else None
        return [reason] if reason else []

    def _bound(self, site: Site) -> BoundSite:
        consumers = tuple(Consumer(name, self._module(name)) for name in site.consumers)
        # The output of a consumer that another site narrows has no dense counterpart.
        narrowed = {name for other in self._sites for name in other.written}
        clear = narrowed.isdisjoint(site.consumers)
        return bind(
            name=str(site),
            kind="named",
            block=0,
            producers=tuple(map(self._producer, site.producers)),
            consumers=consumers,
            along=tuple((name, self._module(name)) for name in site.along),
            probe=ResidualProbe(consumers[0].module, output=True) if clear else None,
        )

    def _producer(self, producer: str | Fused) -> Producer:
        name = str(producer)
        whole = Producer(name, self._module(name))
        if isinstance(producer, str):
            return whole
        channels, left = divmod(len(whole.rows()[0]), producer.parts)
        if left:
            raise ModelError(
                f"{name} writes {len(whole.rows()[0])} values, which are no {producer.parts} parts "
                "of one size"
            )
        parts = (("channels", channels),) * producer.parts
        return replace(whole, parts=parts, turn=1 if producer.interleaved else None)

    def _module(self, name: str) -> nn.Module:
        if name not in self._modules:
            near = [n for n in self._modules if n.rpartition(".")[2] == name.rpartition(".")[2]]
            hint = f"; there are {', '.join(near[:3])}" if near else ""
            raise InputError(f"the model has no layer named {name!r}{hint}")
        return self._modules[name]


def _repeated(names: Sequence[str]) -> list[str]:
    """Returns the names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]
