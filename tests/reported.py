"""Errors of consumers measured in the whole network, to hold `SiteReport.error` against.

Nothing of the calibration is used: dense and narrow networks run by their own forward on the
calibration batches, and hooks record what each consumer returns.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import grail
from grail.networks import BoundSite, CalibrationPoint, find
from grail.statistics.observing import watch
from tests import counting

# Squared errors are differences of sums over fp32 Grams, of which each is 1e-7 off, times what W x
# cancels: up to 100 where a gate reads the means of few images.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-5}


def assert_alike(site: BoundSite, name: str, reported: float | None, measured: Tensor) -> None:
    """Compares squared errors."""
    counting.measured(site.kind)
    assert reported is not None, name
    found = torch.tensor(reported, dtype=torch.float64).square()
    torch.testing.assert_close(
        found, measured.square(), **TOLERANCE, msg=lambda text: f"{name}: {text}"
    )


def assert_errors_are_those_of_the_network(
    dense: nn.Module,
    batches: Sequence[Any],
    sites: Sequence[Any] | None = None,
    masks: Mapping[str, Sequence[Tensor]] | None = None,
    **settings: Any,
) -> None:
    """Narrows the sites of each block alone, and compares each reported error with the network's.

    Upstream of them nothing changes, so T is what the dense consumer returns, less its bias.

    Args:
        dense: a network; it stays as it is.
        batches: calibration.
        sites: as for `grail.compress`.
        masks: by name of consumer, for each batch the tokens that count, of the shape of its
            output less the last axis; default the batch's attention mask.
        settings: of `grail.compress`.
    """
    architecture = find(dense, sites)
    kinds = architecture.kinds if sites is None or not isinstance(sites[0], str) else sites
    found = 0
    for of_block in architecture.sites(kinds):
        for step in _alone(of_block):
            keep = dict.fromkeys(architecture.kinds, 1.0) | {site.name: 0.5 for site in step}
            model = copy.deepcopy(dense)
            report = grail.compress(
                model, batches, keep, sites, drift_correction=0, progress=False, **settings
            )
            rows = {row.name: row for row in report.sites if row.kept < row.channels}
            for site in step:
                for consumer in site.consumers:
                    several = len(site.consumers) > 1
                    name = f"{site.name} → {consumer.name}" if several else site.name
                    masked = (masks or {}).get(consumer.name)
                    expected, got = (
                        consumer_outputs(network, consumer.name, batches, masked)
                        for network in (dense, model)
                    )
                    if not len(expected):  # an expert that was never asked
                        assert rows[name].error is None
                        continue
                    target = expected - _bias(dense, consumer.name)
                    error = (expected - got).norm() / target.norm()
                    assert_alike(site, name, rows[name].error, error)
                    found += 1
    assert found


def assert_errors_of_a_run_are_those_of_the_network(
    dense: nn.Module, batches: Sequence[Any], sites: Sequence[Any] | None = None, **settings: Any
) -> None:
    """Compresses with drift followed, and compares each reported error with the network's.

    The target of a consumer is what it would have to return for the network to hold, where its
    output lands, what the dense network holds there.
    """
    model = copy.deepcopy(dense)
    report = grail.compress(
        model, batches, 0.5, sites, token_weights=False, progress=False, **settings
    )
    rows = {row.name: row for row in report.sites}
    found = 0
    architecture = find(dense, sites)
    for block, of_block in zip(
        architecture.blocks, architecture.sites(sites or architecture.default), strict=True
    ):
        for before in of_block:
            if not before.can_aim(per_tap=True):
                continue
            aim, landed = (_landed(dense, m, before, block, batches) for m in (dense, model))
            name = before.consumers[0].name
            returned = consumer_outputs(model, name, batches) - _bias(dense, name)
            lacking = torch.cat(
                [
                    before.drift(a.float(), h.float()).flatten(0, -2)[_counting(batch, a)]
                    for a, h, batch in zip(aim, landed, batches, strict=True)
                ]
            ).double()
            error = lacking.norm() / (returned + lacking).norm()
            assert_alike(before, name, rows[before.name].error, error)
            found += 1
    assert found


def _alone(sites: Sequence[BoundSite]) -> Iterator[list[BoundSite]]:
    """Sites that can be narrowed without each other: one, or the experts of a layer."""
    groups = itertools.groupby(sites, lambda site: site.group or site)
    yield from (list(group) for _, group in groups)


@torch.no_grad()
def consumer_outputs(
    model: nn.Module,
    name: str,
    batches: Sequence[Any],
    masks: Sequence[Tensor] | None = None,
) -> Tensor:
    """What a layer returns for the tokens that count, [N, O] fp64."""
    found: list[Tensor] = []
    for number, batch in enumerate(batches):
        returned: list[Tensor] = []
        with ExitStack() as hooks:
            _listen(model, name, returned, hooks)
            run(model, batch)
        for output in returned:
            if isinstance(dict(model.named_modules()).get(name), CONVOLUTIONS):
                output = output.movedim(1, -1)
            rows = output.flatten(0, -2) if output.dim() > 1 else output[None]
            if masks is not None:
                rows = rows[masks[number].flatten().bool()]
            elif _is_expert(name) is None:
                rows = rows[_counting(batch, output)]
            found.append(rows)
    return torch.cat(found).double() if found else torch.empty(0, 0, dtype=torch.float64)


CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def run(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch, its cache off where it has one, and torch's fused encoder."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return _run(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{**batch, **({"use_cache": False} if "use_cache" in batch else {})})
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _counting(batch: Any, output: Tensor) -> Tensor | slice:
    """Which rows of a layer's output count, by the batch's attention mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or mask.numel() != output.shape[:-1].numel():
        return slice(None)
    return mask.flatten().bool()


def _is_expert(name: str) -> int | None:
    """The number of an expert, by the name of its second matrix: `….experts.3.down`."""
    parts = name.split(".")
    return int(parts[-2]) if parts[-1] == "down" and parts[-2].isdigit() else None


def _listen(model: nn.Module, name: str, returned: list[Tensor], hooks: ExitStack) -> None:
    number = _is_expert(name)
    if number is None:
        layer = model.get_submodule(name)
        hooks.callback(layer.register_forward_hook(lambda *a: returned.append(a[2].clone())).remove)
        return
    experts: Any = model.get_submodule(name.rsplit(".", 2)[0])
    chosen = experts.config._experts_implementation
    hooks.callback(setattr, experts.config, "_experts_implementation", chosen)
    experts.config._experts_implementation = "eager"
    hooks.enter_context(_Linears(experts.down_proj[number].data_ptr(), returned))


class _Linears(TorchFunctionMode):
    """Records what `linear` returns with the weight at an address."""

    def __init__(self, address: int, returned: list[Tensor]):
        super().__init__()
        self._address, self._returned = address, returned

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        products = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if function in products and args[1].data_ptr() == self._address:
            self._returned.append(output.clone())
        return output


def _bias(model: nn.Module, name: str) -> Tensor | float:
    if _is_expert(name) is not None:
        return 0.0
    bias = getattr(model.get_submodule(name), "bias", None)
    return 0.0 if bias is None else bias.detach().double()


@torch.no_grad()
def _landed(
    dense: nn.Module,
    model: nn.Module,
    site: BoundSite,
    block: nn.Module,
    batches: Sequence[Any],
) -> list[Tensor]:
    """For each batch what a model holds where the output of a site of the dense one lands."""
    names = {module: name for name, module in dense.named_modules()}

    def twin(module: Any) -> Any:
        return None if module is None else model.get_submodule(names[module])

    assert site.probe is not None
    consumers = tuple(replace(c, module=twin(c.module)) for c in site.consumers)
    landing = replace(site.probe, module=twin(site.probe.module))
    place = CalibrationPoint(name=site.name, block=site.block, consumers=consumers, probe=landing)
    seen: list[Tensor] = []
    with watch(place, twin(block), lambda *_: None, lambda landed: seen.append(landed.clone())):
        for batch in batches:
            run(model, batch)
    return seen
