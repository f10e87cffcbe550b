"""Sites that a person names, in any network."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from grail.algebra.width import Width
from grail.arguments import is_whole, plain
from grail.errors import InputError, ModelError
from grail.networks.configuration import has_configuration, not_held
from grail.networks.layers import Along, Axis, Consumer, Places, Producer
from grail.networks.site import Architecture, BoundSite, ResidualProbe, bind
from grail.runtime.transaction import Transaction
from grail_kernels import check_kind

_PAGE = "docs/networks.md#where-sites-come-from"  # of errors


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
            raise InputError(
                f"parts must be an integer of at least 2; got {self.parts!r}", page=_PAGE
            )

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Part:
    """A part of a layer's channels, for a site; the others belong to other sites, or stay.

    A consumer that reads a concatenation reads each of its inputs at such a part, and a layer that
    runs along it is a part in each site. A layer with several ranges writes or reads each channel
    of the site at several places, as the reader of `cat([x, f(x)], 1)` does.

    Args:
        name: of the layer, or of a bare parameter or buffer along the site.
        ranges: (start, stop) of its rows (a producer) or columns (a consumer), ascending, of one
            length; each has all channels of the site, in order. They are those of the layer before
            the run, whatever other sites of the run remove. None are all rows or columns.
        axis: of a bare parameter, along which its channels lie; default the only one that is as
            long as the site has channels.
    """

    name: str
    ranges: Sequence[tuple[int, int]] = ()
    axis: int | None = None

    def __post_init__(self) -> None:
        check_kind("name", self.name, str, "the name of a layer")
        check_kind("ranges", self.ranges, Iterable, "a list of (start, stop)")
        ranges = tuple(map(_range, self.ranges))
        object.__setattr__(self, "ranges", ranges)
        object.__setattr__(self, "axis", plain(self.axis))
        if self.axis is not None and not is_whole(self.axis):
            raise InputError(f"axis must be an integer; got {self.axis!r}", page=_PAGE)
        ends = [end for part in ranges for end in part]
        if ends != sorted(ends) or any(start == stop for start, stop in ranges):
            raise InputError(f"ranges must be ascending and not empty; got {ranges}", page=_PAGE)
        if len({stop - start for start, stop in ranges}) > 1:
            raise InputError(f"ranges must be of one length; got {ranges}", page=_PAGE)
        if not ranges and self.axis is None:
            raise InputError(
                f"a part of {self.name!r} needs ranges, or the axis of a parameter", page=_PAGE
            )

    def __str__(self) -> str:
        return self.name


Layer = str | Part


@dataclass(frozen=True)
class Site:
    """One hidden activation of a network, by the names of its layers (`model.named_modules()`).

    Args:
        producers: layers whose output channels are the site's; `Fused` for one that writes several
            values for each.
        consumers: layers that read all of them. Each of several is fitted to its own input. A
            linear layer can read a map of convolutions flattened channel by channel.
        along: layers in between that treat every channel separately and have parameters for each:
            batch norm, instance norm, depthwise convolutions, PReLU; and bare parameters, such as
            a layer scale.
        name: for the report; default the first consumer's, with its ranges where it is a `Part`.

    A layer of each role can be a `Part`, where the site has some of its channels. Sites that share
    a layer have different parts of it.

    A residual stream is a site, too: every layer that adds to it is a producer, every layer that
    reads it a consumer.
    """

    producers: Sequence[Layer | Fused]
    consumers: Sequence[Layer]
    along: Sequence[Layer] = ()
    name: str = ""

    def __post_init__(self) -> None:
        check_kind("name", self.name, str, "the name of a site")
        for field in ("producers", "consumers", "along"):
            names = getattr(self, field)
            if isinstance(names, (str, Fused, Part)):
                one = f"the string {names!r}" if isinstance(names, str) else repr(names)
                raise InputError(f"{field} must be a list of names; got {one}", page=_PAGE)
            check_kind(field, names, Iterable, "a list of names")
            names = tuple(names)
            kinds = (str, Part, Fused) if field == "producers" else (str, Part)
            for name in names:
                check_kind(f"a name of {field}", name, kinds, "the name of a layer")
            object.__setattr__(self, field, names)
            if twice := _repeated(list(map(str, names))):
                raise InputError(f"{field} names {twice[0]!r} twice", page=_PAGE)
        if not self.producers or not self.consumers:
            raise InputError(
                "a site needs the names of its producers and of its consumers", page=_PAGE
            )
        if both := [str(name) for name in self.consumers if str(name) in self.written]:
            raise ModelError(f"{both[0]} writes the channels that it reads; it cannot be narrowed")

    def __str__(self) -> str:
        if self.name or not isinstance(self.consumers[0], Part):
            return self.name or str(self.consumers[0])
        parts = "".join(f"[{start}:{stop}]" for start, stop in self.consumers[0].ranges)
        return f"{self.consumers[0]}{parts}"

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
        self._axes: dict[tuple[str, str], Axis] = {}  # by role and name of a layer
        names = [str(site) for site in sites]
        if _repeated(names):
            raise InputError(f"sites must have different names; got {', '.join(names)}", page=_PAGE)
        for field, does in (
            ("producers", "written"),
            ("along", "run along"),
            ("consumers", "read"),
        ):
            layers = [layer for site in sites for layer in getattr(site, field)]
            if twice := _overlapping(layers):
                raise InputError(
                    f"two sites are {does} by {twice!r}; it can belong to one, or in parts "
                    "(grail.Part) to several",
                    page=_PAGE,
                )
        for consumer in (c for site in self.sites(self.kinds)[0] for c in site.consumers):
            if consumer.groups == consumer.channels > 1:
                raise ModelError(
                    f"{consumer.name} reads its channels in {consumer.groups} groups of one, so "
                    "none can be left out; a layer that filters each channel runs along a site"
                )

    def sites(self, kinds: Sequence[str]) -> list[list[BoundSite]]:
        return [[self._bound(site) for site in self._sites]]

    def write_config(
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width], transaction: Transaction
    ) -> None:
        """Records where the parts of layers lie now; a resumed run did not narrow them itself."""
        for site in sites:
            width = widths[site.name]
            places = [producer.places for producer in site.producers]
            places += [consumer.places for consumer in site.consumers]
            places += [layer.places for layer in site.along]
            for own in places:
                if own is not None:
                    start, stop = own.ranges[0]
                    own.shrink((stop - start) // width.channels * width.kept, transaction)

    def beyond_configuration(
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width]
    ) -> list[str]:
        found = list(dict.fromkeys(widths[site.name] for site in sites))
        reason = not_held("named", found, "site") if has_configuration(self.blocks[0]) else None
        return [reason] if reason else []

    def _bound(self, site: Site) -> BoundSite:
        consumers = tuple(
            Consumer(str(layer), self._module(layer), places=self._places("consumers", layer))
            for layer in site.consumers
        )
        # The output of a consumer that another site narrows has no dense counterpart.
        narrowed = {name for other in self._sites for name in other.written}
        clear = narrowed.isdisjoint(map(str, site.consumers))
        producers = tuple(map(self._producer, site.producers))
        channels = len(producers[0].rows()[0])
        return bind(
            name=str(site),
            kind="named",
            block=0,
            producers=producers,
            consumers=consumers,
            along=tuple(self._along(layer, channels) for layer in site.along),
            probe=ResidualProbe(consumers[0].module, output=True) if clear else None,
        )

    def _places(self, role: str, layer: Layer | Fused) -> Places | None:
        """Returns the places of a layer's part; all sites share the axis that they lie on."""
        if not isinstance(layer, Part) or not layer.ranges:
            return None
        axis = self._axes.setdefault((role, layer.name), Axis())
        return Places(axis, tuple(layer.ranges))

    def _along(self, layer: Layer, channels: int) -> Along:
        name, places = str(layer), self._places("along", layer)
        axis = layer.axis if isinstance(layer, Part) else None
        owner, _, key = name.rpartition(".")
        module = self._modules.get(owner)
        own = {} if module is None else {**module._parameters, **module._buffers}
        value = own.get(key)
        if module is None or value is None:
            if axis is not None:
                raise InputError(
                    f"{name} is no bare parameter, so its part has no axis", page=_PAGE
                )
            return Along(name, self._module(layer), places=places)
        if not value.is_floating_point():
            raise ModelError(f"{name} has numbers of {value.dtype}, not of each channel")
        if axis is None:
            sizes = list(enumerate(value.shape))
            axes = [a for a, n in sizes if (n == channels if places is None else n > 1)]
            if len(axes) != 1:
                raise ModelError(
                    f"{name} is {list(value.shape)}, where its site has {channels} channels: give "
                    f"their axis, grail.Part({name!r}, axis=…)"
                )
            (axis,) = axes
        if not -value.dim() <= axis < value.dim():
            raise ModelError(f"{name} is {list(value.shape)}; it has no axis {axis}")
        return Along(name, module, key=key, axis=axis % value.dim(), places=places)

    def _producer(self, producer: Layer | Fused) -> Producer:
        name = str(producer)
        whole = Producer(name, self._module(producer), places=self._places("producers", producer))
        if not isinstance(producer, Fused):
            return whole
        channels, left = divmod(len(whole.rows()[0]), producer.parts)
        if left:
            raise ModelError(
                f"{name} writes {len(whole.rows()[0])} values, which are no {producer.parts} parts "
                "of one size"
            )
        parts = (("channels", channels),) * producer.parts
        return replace(whole, parts=parts, turn=1 if producer.interleaved else None)

    def _module(self, layer: Layer | Fused) -> nn.Module:
        name = str(layer)
        if name not in self._modules:
            near = [n for n in self._modules if n.rpartition(".")[2] == name.rpartition(".")[2]]
            hint = f"; there are {', '.join(near[:3])}" if near else ""
            raise InputError(f"the model has no layer named {name!r}{hint}", page=_PAGE)
        return self._modules[name]


def _overlapping(layers: Sequence[Layer | Fused]) -> str | None:
    """Returns the name of a layer of which two sites have the same channels."""
    ranges: dict[str, list[tuple[float, float]]] = {}
    for layer in layers:
        own = layer.ranges if isinstance(layer, Part) else ()
        ranges.setdefault(str(layer), []).extend(own or [(0, math.inf)])
    for name, parts in ranges.items():
        parts.sort()
        if any(first[1] > second[0] for first, second in itertools.pairwise(parts)):
            return name
    return None


def _range(given: object) -> tuple[int, int]:
    """Returns a range (start, stop) of a part in Python's integers."""
    try:
        start, stop = map(plain, given)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        start = stop = None
    if not is_whole(start) or not is_whole(stop) or start < 0:
        raise InputError(
            f"a range of a part must be (start, stop), integers from 0; got {given!r}", page=_PAGE
        )
    return int(start), int(stop)


def _repeated(names: Sequence[str]) -> list[str]:
    """Returns the names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]
