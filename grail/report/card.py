"""The model card of a compressed model: README.md with the header that model hubs read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grail.report.formatting import format_count
from grail.report.report import Report, fitted_parts
from grail.report.summary import (
    before_after,
    evaluation_table,
    explanation,
    keep_in_words,
    labelled,
    size_sentence,
    verdict,
)

_STOCK = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
_UNEVEN = """import grail

model, tokenizer = grail.load_model("FOLDER")"""
_SAVED = """import grail

model = grail.load("FOLDER", make_dense_network)  # a function that returns the dense network"""


def card(report: Report, *, uneven: bool = False, transformers: bool = True) -> str:
    """Returns the Markdown text of README.md.

    Args:
        report: of the compression.
        uneven: stock configurations cannot hold the widths.
        transformers: the folder is a causal language model; else `grail.save` wrote it.
    """
    name = str(report.model.get("name") or report.model.get("class") or "model")
    load = (_UNEVEN if uneven else _STOCK) if transformers else _SAVED
    parts = [
        _header(report, name, uneven, transformers),
        f"# {_plain(name)}, compressed with GRAIL",
        _removed(report),
        "## Load",
        f"```python\n{load}\n```",
        "A stock configuration cannot hold its widths, so grail is needed to load it."
        if uneven
        else "",
        *_scores(report),
        *_origin(report),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _header(report: Report, name: str, uneven: bool, transformers: bool) -> str:
    source = str(report.provenance.get("model", {}).get("source", name))
    local = Path(source).exists() or source.endswith(".gguf")
    fields: dict[str, Any] = {}
    if transformers:
        fields["base_model"] = name if local else source
        fields["library_name"] = "grail" if uneven else "transformers"
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
    header, rows = evaluation_table(labelled(report.evaluation))
    table = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in table)
    size = size_sentence(report)
    sentences = [explanation(report), verdict(report), size and f"On disk: {size}."]
    return ["## Scores", text, *map(_plain, sentences)]


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
    lines += [f"- {role}: {_text(text)}" for role, text in texts.items()]
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
