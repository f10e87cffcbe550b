"""The model card of a compressed model: README.md with the header that model hubs read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from grail.report.formatting import format_count
from grail.report.report import Report, fitted_parts
from grail.report.summary import (
    before_after,
    comparison_tables,
    explanation,
    keep_in_words,
    quantising_sentence,
    size_sentence,
    verdict,
    widths_sentence,
)
from grail.report.texts import worse_sentence

_STOCK = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
_CODE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)"""
_ALONE = """import grail

model, tokenizer = grail.load_model("FOLDER")"""
_SAVED = """import grail

model = grail.load("FOLDER", make_dense_network)  # a function that returns the dense network"""


# What reads a folder: stock transformers; with the folder's code, in two forms; grail alone.
Form = Literal["stock", "decilm", "decilm-256", "uneven", "grail", "saved"]
_LOAD: dict[Form, str] = {
    "stock": _STOCK,
    "decilm": _CODE,
    "decilm-256": _CODE,
    "uneven": _CODE,
    "grail": _ALONE,
    "saved": _SAVED,
}
_BY_CODE = (
    "A stock configuration holds one width for all blocks. The two Python files in this folder add "
    "the widths: GRAIL generates them, and transformers runs them with `trust_remote_code=True`."
)
_NATIVE = "- vLLM has the architecture (DeciLM): `vllm serve FOLDER --trust-remote-code`"
_WHOLE = "- SGLang, MLX and llama.cpp's converter read "
_GGUF = "- llama.cpp, for Llama, Mistral, Qwen2 and Qwen3: `grail export FOLDER --gguf small.gguf`"
_VERIFIED = (
    "- Verified: this folder reloads in transformers to the same bits. Not verified in vLLM: "
    "`grail export FOLDER --check FOLDER` compares it there."
)
_SERVE: dict[Form, list[str]] = {
    "stock": ["- vLLM reads it as it reads the dense model: `vllm serve FOLDER`"],
    "decilm": [
        _NATIVE,
        f"{_WHOLE}only widths in multiples of 256; compress with `--multiple 256` for these.",
    ],
    "decilm-256": [_NATIVE, f"{_WHOLE}its widths, which are multiples of 256 (not run here)."],
    "uneven": [
        "- vLLM, for the families of its transformers backend and unless heads differ by block: "
        "`vllm serve FOLDER --trust-remote-code --model-impl transformers`",
    ],
}


def card(report: Report, form: Form = "stock") -> str:
    """Returns the Markdown text of README.md.

    Args:
        report: of the compression.
        form: "stock" is read by stock transformers; "decilm", "decilm-256" (every width is a
            multiple of 256) and "uneven" with the folder's own code; "grail" by
            `grail.load_model` alone; "saved" is a network that `grail.save` wrote.
    """
    name = str(report.model.get("name") or report.model.get("class") or "model")
    parts = [
        _header(report, name, form),
        f"# {_plain(name)}, compressed with GRAIL",
        _removed(report),
        "## Load",
        f"```python\n{_LOAD[form]}\n```",
        "A stock configuration cannot hold its widths, so grail is needed to load it."
        if form == "grail"
        else "",
        *_served(report, form),
        *_scores(report),
        *_origin(report),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _served(report: Report, form: Form) -> list[str]:
    """Returns how to serve a folder that transformers loads, and what was not verified."""
    if form not in _SERVE:
        return []
    fits = widths_sentence(report)
    lines = [*_SERVE[form], _GGUF, *([f"- {fits}."] if fits else []), _VERIFIED]
    return ["" if form == "stock" else _BY_CODE, "## Serve", "\n".join(lines)]


def _header(report: Report, name: str, form: Form) -> str:
    source = str(report.provenance.get("model", {}).get("source", name))
    local = Path(source).exists() or source.endswith(".gguf")
    fields: dict[str, Any] = {}
    if form != "saved":
        fields["base_model"] = name if local else source
        fields["library_name"] = "grail" if form == "grail" else "transformers"
        fields["pipeline_tag"] = "text-generation"
    fields["tags"] = ["grail", "structured-pruning", "compressed"]
    # JSON values are YAML, and need no rule of quoting.
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
    return "\n".join(["---", *lines, "---"])


def _removed(report: Report) -> str:
    before, after = before_after(report.model.get("parameters"))
    settings, lines = report.settings, []
    if before and after:
        left = f"{after / before:.0%} of {format_count(before)} parameters are left"
        lines.append(f"{left} ({format_count(after)}).")
    for kind in dict.fromkeys(site.kind for site in report.sites):
        sites = [site for site in report.sites if site.kind == kind]
        kept, channels = (sum(getattr(s, n) for s in sites) for n in ("kept", "channels"))
        lines.append(f"- {kind}: {len(sites)} sites, {kept:,} of {channels:,} channels kept")
    chosen = {
        "keep": keep_in_words(settings.get("keep"), report.sites),
        "selector": settings.get("selector"),
        "compensation": _fitted(settings) if "compensate" in settings else None,
    }
    given = ", ".join(f"{name} {value}" for name, value in chosen.items() if value)
    lines.append(f"Settings: {_plain(given)}." if given else "")
    return "\n".join(_spaced(lines))


def _fitted(settings: Mapping[str, Any]) -> str:
    fitted = fitted_parts(settings["compensate"], settings.get("fit_bias", False))
    return f"of {fitted}" if fitted else "none"


def _spaced(lines: list[str]) -> list[str]:
    """Adds blank lines around a list, which Markdown would else join to the text."""
    found: list[str] = []
    for line in filter(None, lines):
        if found and line.startswith("- ") != found[-1].startswith("- "):
            found.append("")
        found.append(line)
    return found


def _scores(report: Report) -> list[str]:
    if not report.evaluation:
        return []
    tables = []
    for header, rows, _ in comparison_tables(report.evaluation):
        table = [header, ["---"] * len(header), *rows]
        tables.append("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in table))
    size = size_sentence(report)
    rounding = quantising_sentence(report)
    sentences = [
        explanation(report),
        worse_sentence(report),
        rounding and f"Quantised: {rounding}.",
        verdict(report),
        size and f"On disk: {size}.",
    ]
    return ["## Scores", *tables, *map(_plain, sentences)]


def _origin(report: Report) -> list[str]:
    origin = report.provenance
    if not origin:
        return []
    code = f"grail {origin.get('grail')}"
    if origin.get("commit"):
        code += f", commit {origin['commit']}"
    lines = [f"- made {origin.get('date')} by {code}"]
    for path, file in origin.get("model", {}).get("files", {}).items():
        lines.append(f"- source {_plain(path)}: sha256 {file['sha256']}")
    texts = {role: origin[role] for role in ("calibration", "evaluation") if role in origin}
    for role, text in texts.items():
        lines.append(f"- {role}: {_text(text)}")
        lines += [f"  - {_text(part)}" for part in text.get("texts", ())]
    lines += [f"- evaluation: {_text(text)}" for text in origin.get("further_evaluations", [])]
    fence = "```"
    return ["## Origin", f"{fence}\n{origin.get('command')}\n{fence}", "\n".join(lines)]


def _text(text: Mapping[str, Any]) -> str:
    tokens = f"{text['tokens']:,} tokens" if "tokens" in text else ""
    hashes = f"sha256 of the token ids {text['tokens_sha256']}" if "tokens_sha256" in text else ""
    return ", ".join(filter(None, (_plain(str(text.get("source"))), tokens, hashes)))


def _plain(text: str) -> str:
    """Escapes text so that Markdown shows it as it is, on one line."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in line)


def _cell(text: str) -> str:
    return _plain(text) if text != "---" else text
