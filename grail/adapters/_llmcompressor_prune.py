"""Pruning and restoring inside llm-compressor's `oneshot`, as a modifier of its recipes.

The modifier runs llm-compressor's sequential pipeline once when it is initialised, in a session of
its own. So later modifiers of the recipe see the narrowed network from their initialisation on:
shapes of scales, checks of group sizes, observers and Hessians are those of the narrow layers.

The pipeline runs each batch through one part of the network, ends that part's epoch, and runs it
again without hooks. At the end of the epoch the sites of the part are narrowed and their consumers
fitted by GRAIL's own solver; the second run moves the calibration past the narrowed part, which is
the closed loop. There is no stream of the dense network, so no drift is corrected.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grail import select
from grail.adapters import _llmcompressor_library as library
from grail.adapters._llmcompressor_config import save_with, settings_of
from grail.adapters._llmcompressor_offload import OffloadTransaction, as_it_was
from grail.calibrate.recorder import Recorder
from grail.calibrate.samples import masks_of
from grail.calibrate.stream import Stream
from grail.errors import EmptyCalibrationError, InputError, ModelError
from grail.networks import Architecture, BoundSite, find, grouped
from grail.networks.layers import Consumer, Routed
from grail.recipe import PRESETS, Recipe, merged
from grail.recipe import settings as settings_of_recipes
from grail.report.report import SiteReport
from grail.run.block import BlockCompressor
from grail.run.blocks import Blocks
from grail.run.narrower import BlockReport
from grail.runtime.clock import Clock
from grail.runtime.processes import checksum, current_processes
from grail.runtime.settings import refuse_unknown
from grail.runtime.transaction import Transaction
from grail.statistics.observing import watch
from grail.statistics.site_statistics import SiteStatistics

_GROUPED = ("group", "tensor_group")  # llm-compressor's strategies whose groups divide the columns


class GrailModifier(library.Modifier):
    """Removes channels or heads inside `oneshot` and refits the layers that read them.

    Args:
        recipe: a `grail.Recipe`, the name of a preset, or the path of a recipe file.
        settings: of `grail.Recipe`, by name, such as keep, multiple, sites, selector or alpha. They
            win over the recipe's.

    It is the first modifier of a recipe. `drift_correction` is 0 and foldings are fitted to the
    folded dense activations, because no dense network runs beside the pruned one.

    `rows`: a `grail.report.SiteReport` for each consumer of each site. `notes`: remarks on the run.

    Raises:
        InputError: at once, a setting that is unknown, of a wrong value or not possible here; when
            `oneshot` starts, a width that a later modifier's groups do not divide, or another
            modifier before this one.
        ModelError: the model's sites are unknown, or a layer is wrapped; the model is as it was.
        EmptyCalibrationError, NonFiniteError, SolveError: as `grail.compress`; the model is as it
            was.

    Source: GRAIL (arXiv 2602.23795), algorithm 1; llm-compressor 0.14.0.1, `pipelines/sequential`.
    """

    model_config: ClassVar[dict[str, str]] = {"extra": "allow"}

    _recipe: Any = None
    _rows: Any = None
    _notes: Any = None

    def __init__(self, **data: Any):
        settings = {name: data[name] for name in data if name not in type(self).model_fields}
        own = {name: value for name, value in data.items() if name not in settings}
        base = settings.pop("recipe", None) or "default"
        first = {name: settings.pop(name, None) for name in ("keep", "sites", "selector")}
        refuse_unknown(settings, settings_of_recipes())
        recipe, _ = merged(base, None, settings, **first)
        shown = recipe.as_dict()
        if isinstance(base, str) and base in PRESETS:
            names = {*settings, *(name for name, value in first.items() if value is not None)}
            shown = {"recipe": base} | {name: shown[name] for name in shown if name in names}
        super().__init__(**own, **shown)
        self._recipe, self._rows, self._notes = _adapted(recipe), [], []

    @property
    def rows(self) -> list[SiteReport]:
        """The report on each site, once the modifier has run."""
        rows: list[SiteReport] = self._rows
        return rows

    @property
    def notes(self) -> list[str]:
        """Remarks on the run."""
        notes: list[str] = self._notes
        return notes

    @torch.inference_mode(False)  # what is made in it could never be trained
    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Narrows the model; called by llm-compressor."""
        model, recipe = state.model, self._recipe
        modifiers = library.active_session().lifecycle.recipe.modifiers
        _require_first(self, model, modifiers)
        given = kwargs.get("calib_data")
        given = state.data.calib if given is None else given
        if given is None:
            raise EmptyCalibrationError("a GrailModifier calibrates; give oneshot a dataset")
        before = settings_of(model)
        with OffloadTransaction() as transaction, as_it_was(model) as plain:
            with plain():
                architecture = _found(model, recipe)
                sites, widths = recipe.all_sites(architecture), recipe.widths(architecture)
                if reasons := architecture.beyond_configuration(sites, widths):
                    raise InputError(
                        f"{reasons[0]}, so the model that oneshot saves could not be loaded; "
                        "choose other sites or shares, or use grail.compress and grail.save"
                    )
                _require_divided(model, sites, widths, modifiers)
                stream = _PipelineStream(model, architecture, _batches(given))
                if recipe.fit_bias:
                    architecture.ensure_biases(sites, transaction)
                pruning = _Pruning(architecture, recipe, stream, transaction)
            stage = _Stage()
            stage._pruning = pruning
            _run_pipeline(model, stage, stream, pruning.targets(kwargs.get("sequential_targets")))
            architecture.write_config(sites, widths, transaction)
        save_with(model, before)
        self._rows = pruning.rows
        self._notes = pruning.notes
        for note in self._notes:
            library.logger.warning(note)
        return True


class _Stage(library.Modifier):
    """The modifier of the pruning's own session."""

    requires_calibration_data: bool = True
    _pruning: Any = None

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        self._pruning.watch()

    def on_sequential_epoch_end(
        self, state: Any, event: Any, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        self._pruning.narrow(set(modules))

    def on_calibration_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        self._pruning.require_complete()


class _Pruning:
    """The sites of a network on their way through the pipeline.

    Args:
        architecture: nothing of it is narrow yet.
        recipe: without drift.
        stream: the counts and masks of the calibration.
        transaction: through which the model is changed.

    `rows`, `notes`: for the modifier.
    """

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        stream: "_PipelineStream",
        transaction: Transaction,
    ):
        self._blocks = Blocks(architecture, recipe, stream, Clock(stream.device))
        self._compressor = BlockCompressor(self._blocks, transaction)
        self._waiting = list(itertools.chain(*self._blocks.active))
        self._hooks: dict[BoundSite, ExitStack] = {}
        self._collected: dict[BoundSite, list[SiteStatistics]] = {}
        self._read: dict[Consumer, int] = {}  # the last batch that each consumer read
        self.report = BlockReport()
        self.notes: list[str] = self.report.notes

    @property
    def rows(self) -> list[SiteReport]:
        """One row for each consumer of each narrowed site."""
        return self.report.rows

    def targets(self, given: Any) -> Any:
        """Returns the modules that the pipeline runs one by one, by name; None is its default.

        Where a block has several sites, each site's own module, so that a site is calibrated after
        the sites before it are narrow.
        """
        if given is not None or not any(len(grouped(sites)) > 1 for sites in self._blocks.active):
            return given
        names = [_common(site) for site in self._waiting]
        nested = any(a != b and f"{b}.".startswith(f"{a}.") for a in names for b in names)
        if nested or len(set(names)) < len(names):
            self.notes.append(
                "sites of one block were calibrated together, each on the dense ones before it"
            )
            return None
        return names

    def watch(self) -> None:
        """Observes what the consumers of all sites read."""
        recipe, stream = self._blocks.recipe, self._blocks.stream
        for site in self._waiting:
            hooks = self._hooks[site] = ExitStack()
            self._collected[site] = [
                SiteStatistics(site, consumer, stream, recipe) for consumer in site.consumers
            ]
            read = partial(self._update, site)
            hooks.enter_context(watch(site, stream.blocks[site.block], read, None))

    def _update(
        self, site: BoundSite, consumer: Consumer, x: Tensor, routed: Routed | None
    ) -> None:
        batch = library.active_session().state.current_batch_idx
        if self._read.get(consumer) == batch:
            raise ModelError(
                f"{consumer.name} runs more than once for a batch, in chunks or for several "
                "inputs; it is narrowed only where it runs once"
            )
        self._read[consumer] = batch
        statistics = self._collected[site][site.consumers.index(consumer)]
        statistics.update(batch, x.to(self._blocks.stream.device), routed=routed)

    def narrow(self, modules: set[nn.Module]) -> None:
        """Narrows the sites whose consumers were all read among these modules."""
        for step in grouped(list(self._waiting)):
            consumers = [consumer for site in step for consumer in site.consumers]
            if not all(consumer.module in modules for consumer in consumers):
                continue
            for site in step:
                self._hooks.pop(site).close()
                self._waiting.remove(site)
            collected = {site: self._collected.pop(site) for site in step}
            self._compressor.narrow(collected, {}, {}, self.report)
            self._log(step)

    def _log(self, step: Sequence[BoundSite]) -> None:
        for row in itertools.chain(*(self.report.sites[site.name] for site in step)):
            errors = (row.error, row.baseline_error)
            shown = " instead of ".join("?" if e is None else f"{e:.3g}" for e in errors)
            library.logger.info(
                f"{row.name}: {row.kept} of {row.channels} channels stay; relative error of the "
                f"output {shown} by plain pruning"
            )

    def require_complete(self) -> None:
        """Raises ModelError for sites that did not run."""
        self.close()
        if self._waiting:
            raise ModelError(
                f"{self._waiting[0].name} and {len(self._waiting) - 1} more sites did not run in "
                "one part of llm-compressor's sequential pipeline; leave sequential_targets out"
            )

    def close(self) -> None:
        """Removes the hooks that are left."""
        for hooks in self._hooks.values():
            hooks.close()
        self._hooks.clear()


class _PipelineStream(Stream):
    """The counts and masks of batches that llm-compressor's pipeline runs.

    `batches`: as the pipeline gets them. In a group of processes each has its own.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, batches: Sequence[Any]):
        super().__init__(
            model, architecture.blocks, batches, device=torch.device(library.get_main_device())
        )
        self.given, processes = batches, current_processes()
        if processes.count > 1:
            processes.require_equal("the model", checksum(model.parameters()))
        counts = processes.total(torch.tensor([self.tokens, self.samples], dtype=torch.int64))
        self.tokens, self.samples = map(int, counts)
        self.holds_out = any(processes.gather(self.holds_out))
        self.processes = processes

    def _enter(self, recorder: Recorder, batch: Any) -> None:
        """Keeps the shape and the masks of a batch, which the pipeline runs."""
        if not isinstance(batch, Mapping):
            raise InputError(
                f"a batch of oneshot must be a mapping of the model's arguments; got "
                f"{type(batch).__name__}"
            )
        texts = [batch[name] for name in ("input_ids", "inputs_embeds") if name in batch]
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
        if not tensors:
            raise InputError("a batch of oneshot holds no tensor with samples along its first axis")
        shape = texts[0].shape[:2] if texts else tensors[0].shape[:1]
        self.hidden.put(len(self), torch.zeros(shape, dtype=torch.bool))
        self.masks.append(masks_of(recorder.model, (), batch).cpu())
        self._calls.append([])


def _adapted(recipe: Recipe) -> Recipe:
    """Returns a recipe for a pipeline without a dense network beside.

    Raises:
        InputError: a setting that needs what the pipeline does not have.
    """
    needs = {
        "drift_correction": recipe.drift_correction not in ("auto", 0),
        "repair": recipe.repair,
        f"selector {recipe.selector!r}": recipe.needs_gradient,
    }
    for setting, asked in needs.items():
        if asked:
            raise InputError(
                f"{setting} needs the dense network or gradients, which llm-compressor's pipeline "
                "does not have; leave it out, or call grail.compress before oneshot"
            )
    folds = getattr(select.get(recipe.selector), "folds", False)
    changes: dict[str, Any] = {"exact_folding": False} if folds else {}
    return dataclasses.replace(recipe, drift_correction=0.0, **changes)


def _found(model: nn.Module, recipe: Recipe) -> Architecture:
    """Returns the architecture of a known family.

    Raises:
        ModelError: another network, or a mixture of experts in llm-compressor's form.
    """
    for name, module in model.named_modules():
        if isinstance(module, library.LinearExperts2D):
            raise ModelError(
                f"{name} holds experts in llm-compressor's own form, whose sites are unknown; call "
                "grail.compress before oneshot"
            )
    architecture = find(model, recipe.sites)
    if not architecture.trusted:
        raise ModelError(
            f"the sites of {architecture.name} are named, and only a network of a known family is "
            "pruned inside oneshot; call grail.compress before it"
        )
    return architecture


def _require_first(own: Any, model: nn.Module, modifiers: Sequence[Any]) -> None:
    """Raises InputError unless the modifier is a recipe's first, and nothing is quantised."""
    if sum(isinstance(modifier, GrailModifier) for modifier in modifiers) > 1:
        raise InputError(
            "a recipe has several GrailModifiers; one narrows sites of several kinds: "
            'sites=["heads", "mlp"], keep={"heads": 0.8, "mlp": 0.7}'
        )
    if modifiers and modifiers[0] is not own:
        raise InputError(
            f"{type(modifiers[0]).__name__} is before GrailModifier; it narrows what later "
            "modifiers work on, so it must be the first of the recipe"
        )
    quantised = (name for name, m in model.named_modules() if library.is_module_quantized(m))
    if name := next(quantised, None):
        raise InputError(f"{name} is quantised already; prune before quantisation")


def _require_divided(
    model: nn.Module,
    sites: Sequence[BoundSite],
    widths: Mapping[str, Any],
    modifiers: Sequence[Any],
) -> None:
    """Raises InputError for a layer whose columns the groups of a quantisation do not divide."""
    kept = {c.module: widths[s.name].kept * c.taps for s in sites for c in s.consumers}
    for modifier in modifiers:
        if not isinstance(modifier, library.QuantizationMixin):
            continue
        if modifier.bypass_divisibility_checks:
            continue
        for scheme in modifier.resolved_config.config_groups.values():
            weights = scheme.weights
            if weights is None or weights.strategy not in _GROUPED or not weights.group_size:
                continue
            group, by = int(weights.group_size), type(modifier).__name__
            for name, module in library.match_named_modules(model, scheme.targets, modifier.ignore):
                columns = kept.get(module, getattr(module, "in_features", 0))
                if columns > group and columns % group:
                    remedy = (
                        f"give multiple={group}"
                        if module in kept
                        else "name it in the quantisation's ignore, or choose other groups"
                    )
                    raise InputError(
                        f"{name} would read {columns} channels, which groups of {group} of {by} "
                        f"do not divide; {remedy}",
                        page="docs/serving/index.md#which-widths-run-fast",
                    )


def _batches(given: Any) -> list[Any]:
    """Returns all batches, read once: a sampler may draw another order the next time."""
    batches = list(given)
    if not batches:
        raise EmptyCalibrationError("oneshot's dataset has no batch")
    return batches


def _run_pipeline(model: nn.Module, stage: Any, stream: _PipelineStream, targets: Any) -> None:
    """Runs llm-compressor's sequential pipeline with one modifier, in a session of its own."""
    arguments = library.DatasetArguments(sequential_targets=targets)
    arguments.propagate_error = stage._pruning._blocks.recipe.closed_loop
    pipeline = library.CalibrationPipeline.load_from_registry("sequential")
    with stream.processes.together(), library.create_session() as session:
        session.initialize(model=model, recipe=[stage])
        try:
            pipeline(model, stream.given, arguments)
        finally:
            stage._pruning.close()
        session.finalize()


def _common(site: BoundSite) -> str:
    """Returns the name of the module that holds all layers of a site."""
    paths = [name.split(".") for name in site.modules()]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same)
