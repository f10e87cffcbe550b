"""The part of `grail export` that writes GGUF files and importance matrices for llama.cpp."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from grail.commands.options import Given
from grail.errors import InputError
from grail.files.mixture import Mixture
from grail.files.pretrained import Pretrained
from grail.files.text import SOURCES, Text
from grail.recipe import Quantize
from grail.report.formatting import format_bytes, format_number
from grail.runtime.settings import setting
from grail.serving.gguf_check import Comparison
from grail.serving.gguf_quantizing import Rounding
from grail.serving.gguf_types import FileDtype
from grail.serving.gguf_writing import GgufFile, check_gguf, export_gguf
from grail.serving.imatrix import ImatrixFile, export_imatrix, require_imatrix_output
from grail.serving.vllm_check import VllmComparison, check_vllm


@dataclass(frozen=True)
class GgufOptions:
    """The options of `grail export` for llama.cpp."""

    gguf: Path | None = setting(
        None, "GGUF file to create, which stock llama.cpp loads.", metavar="FILE"
    )
    imatrix: Path | None = setting(
        None,
        "Importance matrix to create, for llama-quantize --imatrix on the file that --gguf writes "
        "with the same --pad.",
        metavar="FILE",
    )
    calibration: list[str] | None = setting(
        None,
        f"Text for --imatrix and --quantize: {SOURCES}. Given several times, the texts are mixed "
        "by --shares.",
        shown="the text that FOLDER was calibrated on",
        metavar="TEXT",
    )
    quantize: Quantize | None = setting(
        None,
        "Quantise the matrices of --gguf by GPTQ: q4_1 (5 bits a weight) or q8_0 (8.5). A folder "
        "of grail compress --quantize is quantised as it is.",
    )
    evaluate: str | None = setting(
        None,
        "Held-out text, on which --quantize is compared with rounding to nearest.",
        metavar="TEXT",
    )
    like: Path | None = setting(
        None,
        "GGUF file of the dense model, for tokenizer, chat template and keys. llama.cpp makes one: "
        "python convert_hf_to_gguf.py MODEL --outfile dense.gguf",
        shown="the file that was compressed, if it was GGUF",
        metavar="FILE",
    )
    pad: Literal["32", "256"] = setting(
        "32",
        "Widen each MLP by zero channels to a multiple of this, so that quantised formats fit: 32 "
        "for Q4_0, Q4_1 and Q8_0, 256 for K-quants such as Q4_K_M.",
    )
    dtype: FileDtype = setting("float32", "Dtype of the matrices in the file.")


def write(given: Given, folder: Path, verify: bool) -> tuple[dict[str, Any], list[str]]:
    """Writes the files; returns facts for JSON, and lines for people."""
    asked = given.make(GgufOptions)
    if asked.gguf is not None and asked.gguf == asked.imatrix:
        raise InputError("--gguf and --imatrix name the same file; name two")
    text = _text(given, asked)
    if asked.imatrix is not None:  # before anything is written
        require_imatrix_output(folder, asked.imatrix, text)
    facts: dict[str, Any] = {}
    lines: list[str] = []
    if asked.gguf is not None:
        file = export_gguf(
            folder,
            asked.gguf,
            asked.like,
            pad=int(asked.pad),
            dtype=asked.dtype,
            quantize=asked.quantize,
            calibration=None if asked.quantize is None else text,
            evaluate=asked.evaluate,
            verify=verify,
            progress=not given.prints_json,
        )
        facts = asdict(file) | {"path": str(file.path), "template": str(file.template)}
        facts["comparison"] = _numbers(file.comparison)
        lines += _about(file, asked.gguf)
    if asked.imatrix is not None:
        device = given.of(Pretrained).get("device", "auto")
        matrix = export_imatrix(folder, asked.imatrix, text, pad=int(asked.pad), device=device)
        facts["imatrix"] = asdict(matrix) | {"path": str(matrix.path)}
        lines.append(f"imatrix {asked.imatrix} ({format_bytes(matrix.bytes)}, {_content(matrix)})")
    return facts, lines


def compare(folder: Path, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Compares a GGUF file, or a folder in vLLM; returns facts for JSON, and lines for people."""
    comparison = check_vllm(folder, path) if path.is_dir() else check_gguf(folder, path)
    facts = {"check": str(path), "comparison": _numbers(comparison)}
    return facts, [_compared(comparison, in_vllm=path.is_dir())]


def _text(given: Given, asked: GgufOptions) -> Text | Mixture | None:
    """Returns the text that is given."""
    return given.calibration(asked.calibration) if asked.calibration else None


def _about(file: GgufFile, name: Path) -> list[str]:
    """Returns what is in a file, in lines."""
    return [
        f"gguf    {name} ({format_bytes(file.bytes)}, {file.dtype})",
        f"form    {_form(file)}",
        *_rounding(file.rounding),
        _compared(file.comparison),
    ]


def _content(file: ImatrixFile) -> str:
    """Returns the contents of an importance matrix in words."""
    return f"{file.matrices} matrices, {file.tokens:,} tokens of {file.calibration['source']}"


def _form(file: GgufFile) -> str:
    """Returns architecture and widths in words."""
    least, most = min(file.widths), max(file.widths)
    widths = f"{least}" if least == most else f"{least} to {most}"
    added = f", {file.channels_added} of them zero" if file.channels_added else ""
    return (
        f"architecture {file.architecture}, {len(file.widths)} blocks, MLP width {widths} "
        f"({sum(file.widths):,} channels{added})"
    )


def _rounding(rounding: Rounding | None) -> Iterator[str]:
    """Yields what quantising cost, in words."""
    if rounding is None:
        return
    if (errors := rounding.errors) is not None:
        yield (
            f"error   {errors[0]:.3g} of a layer's output by GPTQ, {errors[1]:.3g} to nearest "
            f"(mean of {len(rounding.layers)} layers)"
        )
    if found := rounding.perplexity:
        before, nearest, gptq = (format_number(found[k]) for k in ("before", "nearest", "gptq"))
        share = rounding.recovered
        recovers = "" if share is None else f", which recovers {share:.0%} of what rounding loses"
        yield f"text    perplexity {before}, rounded to nearest {nearest}, by GPTQ {gptq}{recovers}"


def _numbers(comparison: Comparison | VllmComparison | None) -> dict[str, Any] | None:
    return None if comparison is None else asdict(comparison) | {"share": comparison.share}


def _compared(comparison: Comparison | VllmComparison | None, in_vllm: bool = False) -> str:
    """Returns a comparison with the folder in words."""
    if comparison is not None:
        return f"check   {comparison}"
    if in_vllm:
        return "check   not verified in vLLM: install vLLM in the environment of grail"
    return (
        "check   not verified in llama.cpp: pip install llama-cpp-python, then grail export "
        "FOLDER --check FILE"
    )
