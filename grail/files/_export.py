"""Exports a model as a plain `save_pretrained` folder that is complete, or is not there at all."""

from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from grail.arguments import require_language_model
from grail.errors import ExportError, GrailError, InputError, one_line
from grail.files import block_widths, grids, remote_code
from grail.files.alignment import align_file
from grail.files.load import positions, read_model, runs_own_code
from grail.files.saving import describe, write
from grail.report._evaluate import measure_size
from grail.report.card import Form, card
from grail.report.report import Report
from grail.runtime.folder import complete
from grail.runtime.transaction import eval_no_grad
from grail_kernels import check_kind, kind_of

# Sequences and tokens on which the reloaded model must agree; fewer tokens if it has no positions.
_PROBE = (2, 32)


def export(
    model: Any,
    tokenizer: Any,
    output: str | Path,
    report: Report | Callable[[], Report] | None = None,
    page: str | Callable[[Report], str | None] | None = None,
    *,
    uneven: bool = False,
) -> Path:
    """Saves model and tokenizer, and proves that the folder reloads to the same logits.

    The folder gets its name only once it was reloaded and compared. The comparison holds a second
    copy of the model on the same device. `grail.load_model` reads the folder. Of a quantised model
    the grids of its weights are written as well, for `grail.export_gguf`.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; None writes none.
        output: folder to create; one that exists must be empty.
        report: written as `report.json`, its settings as `recipe.json`, and in words as the model
            card `README.md`; or a function that returns it, called after the model was written and
            compared. Its `files` are set to the hashes of the weights.
        page: HTML text, written as `report.html`; or a function of the report that returns it, or
            None for no page.
        uneven: the configuration cannot hold the widths, because they differ by block
            (`report.model["beyond_configuration"]` of a run). The folder then holds two small files
            of Python code, with which stock transformers loads it (`trust_remote_code=True`); of
            the Llama shape vLLM as well, as DeciLM. Where that code cannot express the widths,
            weights and widths are written as by `grail.save`, and only grail reads the folder.

    Returns:
        The path of the folder.

    Raises:
        InputError: `output` is in use; nothing was written.
        ExportError: too little disk, the folder could not be written, or it does not reload to
            bitwise the same logits.
    """
    require_language_model(model)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise InputError(f"tokenizer must be one of transformers; got {kind_of(tokenizer)}")
    if not callable(report):
        check_kind("report", report, (Report, NoneType), "a grail.Report, or a function")
    if not callable(page):
        check_kind("page", page, (str, NoneType), "text, or a function of the report")
    code = _code(model) if uneven else None
    with complete(output, ExportError, size=measure_size(model)[1]) as folder:
        _write(folder, model, tokenizer, code, alone=uneven and code is None)
        grids.write(model, folder)
        _verify(folder, model)
        form = _form(uneven, code)
        _describe(folder, report, page, form)
    return Path(output).resolve()


def _code(model: Any) -> block_widths.Expressed | None:
    """Returns a model's widths as remote code; None where it cannot express them."""
    try:
        return block_widths.express(model)
    except GrailError:
        return None


def _form(uneven: bool, code: block_widths.Expressed | None) -> Form:
    """Returns the form of a folder, for its model card."""
    if not uneven:
        return "stock"
    if code is None:
        return "grail"
    if code.by_ffn_mult:
        return "decilm-256"
    return "decilm" if code.decilm else "uneven"


def _write(
    folder: Path,
    model: Any,
    tokenizer: Any,
    code: block_widths.Expressed | None,
    alone: bool,
) -> None:
    try:
        if alone:
            write(model, folder)
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        else:
            # The names of checkpoints are translated by model type, which code of its own changes.
            names = {} if code is None else {"save_original_format": False}
            model.save_pretrained(folder, **names)
            for weights in folder.glob("*.safetensors"):
                align_file(weights)
            if code is not None:
                remote_code.write(code.code, code.settings, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    # Refusals and full disks come as ValueError, RuntimeError, OSError, SafetensorError, …
    except Exception as error:
        raise ExportError(f"transformers cannot save this model: {one_line(error)}") from error


def _describe(
    folder: Path,
    report: Report | Callable[[], Report] | None,
    page: str | Callable[[Report], str | None] | None,
    form: Form,
) -> None:
    """Writes the files for people; a README.md of the model's own stays."""
    found = report() if callable(report) else report
    if callable(page):
        page = None if found is None else page(found)  # before the report: it may add a note
    if page is not None:
        (folder / "report.html").write_text(page, encoding="utf-8")
    if found is not None:
        describe(found, folder, card(found, form))


def _verify(folder: Path, model: Any) -> None:
    try:
        reloaded, _ = read_model(
            folder,
            attn_implementation=model.config._attn_implementation,
            trust_remote_code=runs_own_code(model),
        )
    except Exception as error:
        raise ExportError(
            f"the exported model does not load again: {one_line(error)}; if its configuration "
            "cannot hold its widths (a run notes that), give uneven=True"
        ) from error
    expected, found = _logits(model), _logits(reloaded.to(model.device))
    if expected.dtype != found.dtype:
        raise ExportError(
            f"the exported model reloads as {found.dtype}, and was {expected.dtype}; "
            "convert the whole model to one dtype before the export"
        )
    if not torch.equal(expected, found):
        difference = (expected.double() - found.double()).abs().max().item()
        raise ExportError(
            "the exported model does not reload to the same logits, so nothing was exported: the "
            f"largest difference is {difference:.3g} (NaN: logits are not finite); usual causes: a "
            "parameter that this architecture does not store, or a cast with model.to(dtype), "
            "which rounds rotary frequencies too; load the model in that dtype instead"
        )


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """Returns logits [sequences, tokens, vocabulary] on random tokens, the same for each call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    rows, length = _PROBE
    length = min(length, positions(model) or length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    with eval_no_grad(model):
        return model(tokens.to(model.device), use_cache=False).logits
