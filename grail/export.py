"""Writes a model as a plain `save_pretrained` folder that is complete, or is not there at all."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grail.errors import ExportError, InputError
from grail.evaluate import measure_size
from grail.report import Report
from grail.transaction import steady

_MARGIN = 32 << 20  # bytes for tokenizer, configuration and report beside the weights
_PROBE = (2, 32)  # sequences and tokens on which the reloaded model must agree


def export(
    model: Any,
    tokenizer: Any,
    output: str | Path,
    report: Report | None = None,
    page: str | None = None,
) -> Path:
    """Saves model and tokenizer, and proves that the folder reloads to the same logits.

    Everything is written into a hidden sibling folder ending in `.partial`, flushed to disk,
    reloaded and compared; only then does the folder get its name. Whatever interrupts this,
    `output` does not exist. The comparison holds a second copy of the model on the same device.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; None writes none.
        output: folder to create; one that exists must be empty.
        report: written as `report.json`.
        page: HTML text, written as `report.html`.

    Returns:
        The path of the folder.

    Raises:
        InputError: `output` is in use; nothing was written.
        ExportError: too little disk, the folder could not be written, or it does not reload to
            bitwise the same logits.
    """
    final = check_output(output, measure_size(model)[1])
    partial = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        _write(partial, model, tokenizer, report, page)
        flush(partial)
        _verify(partial, model)
        partial.rename(final)
        flush(final.parent, contents=False)
    except OSError as error:
        raise ExportError(f"{final} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already after the rename
    return final


def check_output(output: str | Path, size: int = 0) -> Path:
    """Refuses an output folder that is in use or too small; call it before any work.

    Args:
        output: the folder to be created.
        size: bytes of the weights that will be written there.

    Returns:
        The absolute path of the folder.

    Raises:
        InputError: `output` is a file, or a folder that is not empty.
        ExportError: the disk has less space than `size` and a margin of 32 MiB.
    """
    final = Path(output).resolve()  # renaming onto a link would fail at the very end
    if final.is_mount():
        raise InputError(f"The output {output} is a mount point; name a folder inside it.")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        kind = "is not empty" if final.is_dir() else "is a file"
        raise InputError(f"The output {output} {kind}; name a new or an empty folder.")
    existing = next(folder for folder in (final, *final.parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"The output {output} lies under {existing}, which is a file.")
    needed, free = size + _MARGIN, shutil.disk_usage(existing).free
    if size and free < needed:
        raise ExportError(
            f"The output {output} needs {needed / 2**20:,.0f} MiB and the disk has "
            f"{free / 2**20:,.0f} MiB free; free some space or choose another disk."
        )
    return final


def _write(
    folder: Path, model: Any, tokenizer: Any, report: Report | None, page: str | None
) -> None:
    try:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    # Refusals and full disks come as ValueError, RuntimeError, OSError, SafetensorError, …
    except Exception as error:
        raise ExportError(f"transformers cannot save this model: {error}") from error
    if report is not None:
        report.save(folder / "report.json")
    if page is not None:
        (folder / "report.html").write_text(page, encoding="utf-8")


def _verify(folder: Path, model: Any) -> None:
    from transformers import AutoModelForCausalLM

    try:
        reloaded = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=model.config._attn_implementation
        )
    except Exception as error:
        raise ExportError(f"The exported model does not load again: {error}") from error
    expected, found = _logits(model), _logits(reloaded.to(model.device))
    if expected.dtype != found.dtype:
        raise ExportError(
            f"The exported model reloads as {found.dtype}, and was {expected.dtype}; "
            "convert the whole model to one dtype before the export."
        )
    if not torch.equal(expected, found):
        difference = (expected.double() - found.double()).abs().max().item()
        raise ExportError(
            "The exported model does not reload to the same logits, so nothing was exported: the "
            f"largest difference is {difference:.3g} (NaN: logits are not finite). Usual causes: a "
            "parameter that this architecture does not store, or a cast with model.to(dtype), "
            "which rounds rotary frequencies too; load the model in that dtype instead."
        )


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """Logits [sequences, tokens, vocabulary] on random tokens, the same for each call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, _PROBE, generator=torch.Generator().manual_seed(0))
    with steady(model):
        return model(tokens.to(model.device), use_cache=False).logits


def flush(folder: Path, contents: bool = True) -> None:
    """A folder, and everything in it, is on the disk afterwards: no rename can outrun the data."""
    for path in (*(folder.rglob("*") if contents else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
