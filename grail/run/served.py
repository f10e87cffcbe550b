"""Which quantisers and runtimes accept the widths of a run, known before it starts."""

from collections.abc import Iterable, Sequence
from typing import Any

from grail.algebra.targets import RULES
from grail.algebra.width import ChannelWidth, HeadWidth, Width
from grail.errors import InputError
from grail.networks import BoundSite
from grail.recipe import Recipe

Sites = Sequence[tuple[BoundSite, Width]]

GROUPS = (128, 64)  # of quantisers, the usual one first


class WidthWarning(UserWarning):
    """Widths that quantisers refuse."""


def generates(model: Any) -> bool:
    """Returns whether a network is a language model of transformers: such are quantised."""
    return bool(getattr(model, "can_generate", lambda: False)())


def fits(widths: Iterable[tuple[BoundSite, Width]]) -> dict[str, dict[str, int]]:
    """Returns for each kind of site how many widths satisfy each rule of `targets.RULES`."""
    found: dict[str, dict[str, int]] = {}
    for site, width in widths:
        counts = found.setdefault(site.kind, dict.fromkeys(map(str, RULES), 0))
        for rule in RULES:
            counts[str(rule)] += width.splits(rule.parts, rule.multiple)
    return found


def refused(model: Any, recipe: Recipe, widths: Sites) -> list[str]:
    """Returns a sentence with the remedy for each kind of which a run spoils widths.

    Those are widths that no usual group divides, where the dense width had such a group; of a
    network that is no language model, or that the run itself quantises, there are none.
    """
    kinds: dict[str, list[tuple[BoundSite, Width]]] = {}
    for site, width in widths if generates(model) and not recipe.quantize else ():
        kinds.setdefault(site.kind, []).append((site, width))
    return [
        _sentence(kind, len(of_kind), spoilt, recipe)
        for kind, of_kind in kinds.items()
        if (spoilt := [each for each in of_kind if _is_spoilt(*each)])
    ]


def _is_spoilt(site: BoundSite, width: Width) -> bool:
    return site.channels % min(GROUPS) == 0 and not width.splits(1, min(GROUPS))


def _sentence(kind: str, count: int, spoilt: Sites, recipe: Recipe) -> str:
    site, width = spoilt[0]
    if len({width for _, width in spoilt}) == 1:
        channels = "" if isinstance(width, ChannelWidth) else f", {width.kept} channels,"
        subject = f"{width}{channels} is a multiple"
    else:
        subject = f"{len(spoilt)} of {count} widths, such as {width.kept}, are multiples"
    remedy = _remedy(site, width, recipe)
    if len({width for _, width in spoilt}) > 1:
        remedy = remedy.partition(",")[0]
    groups = " nor ".join(map(str, GROUPS))
    return (
        f"{kind}: {subject} of neither {groups}, and quantisation in groups of so many channels, "
        f"as by GPTQ, refuses other widths{remedy and f'; {remedy}'}"
    )


def _remedy(site: BoundSite, width: Width, recipe: Recipe) -> str:
    """Returns a setting that leads to a width with a group, and the width; else nothing."""
    keep = recipe.keep_of(site)
    if isinstance(width, HeadWidth):
        heads = width.groups * width.queries
        shares = sorted((n / heads for n in range(1, heads)), key=lambda share: abs(share - keep))
        for share in shares:
            other = site.width(share, None)
            if other.kept < site.channels and other.splits(1, min(GROUPS)):
                exact = other.kept / other.channels
                return f"choose keep={exact:.3g} of {site.kind}, which gives {other.kept} channels"
        return ""
    for multiple in GROUPS:
        try:
            other = site.width(keep, multiple)
        except InputError:
            continue
        if other.kept < site.channels:
            return f"choose multiple={multiple}, which gives {other.kept}"
    return ""
