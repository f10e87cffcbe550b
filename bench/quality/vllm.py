"""Compressed folders in vLLM: its log-probabilities and greedy tokens beside transformers'.

    python -m bench.quality.vllm     the cases that bench/results/vllm.csv lacks

Tiny random models of each form, and SmolLM2-135M with half of its MLP channels. Run it by the
interpreter of vLLM's environment: `python -m bench.tools.vllm` makes it. Rows that are in the CSV
are not measured again.
"""

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import grail
from bench.tools import assets, tiny
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Row, Table
from grail.errors import GrailError
from grail.serving.vllm_check import VllmComparison, check_vllm

_MLP = {"mlp": [0.3, 0.5, 0.7]}
# Heads of 32 channels: vLLM's attention takes no smaller ones.
_SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
_NATIVE, _EIGHT = "DeciLMForCausalLM", {"num_attention_heads": 8}


@dataclass(frozen=True)
class Case:
    """A tiny model, how it is compressed, and vLLM's class of it or why it is refused."""

    family: str
    keep: Mapping[str, Any]
    form: str = _NATIVE
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""


_BACKEND = "TransformersForCausalLM"
CASES = {
    "llama": Case("llama", {"mlp": 0.5, "heads": 0.5}, "LlamaForCausalLM", _EIGHT),
    "llama, uneven": Case("llama", _MLP),
    "llama, uneven, multiples of 256": Case(
        "llama", _MLP, config={"intermediate_size": 1024}, settings={"multiple": 256}
    ),
    "llama, uneven, biases": Case("llama", _MLP, settings={"fit_bias": True}),
    "llama, uneven, tied": Case("llama", _MLP, config={"tie_word_embeddings": True}),
    "llama, fewer heads, uneven": Case("llama", {**_MLP, "heads": 0.5}, config=_EIGHT),
    "qwen2, uneven": Case("qwen2", _MLP),
    "qwen3, uneven": Case("qwen3", _MLP, _BACKEND),
    "llama, heads that differ by block": Case(
        "llama", {"heads": [1.0, 0.25, 0.5]}, config=_EIGHT, refused="its heads differ by block"
    ),
}
SMOLLM2: dict[str, Mapping[str, Any]] = {
    "SmolLM2, even": {"mlp": 0.5},
    "SmolLM2, uneven": {"mlp": [random.Random(block).uniform(0.3, 0.7) for block in range(30)]},
    "SmolLM2, fewer heads": {"mlp": 0.5, "heads": 2 / 3},
}


def write_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """Compresses the tiny model of a case, and exports it into a new folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    case = CASES[name]
    sizes = {**_SIZES, **case.config}
    if case.family == "qwen2":  # its head_dim is hidden_size / heads
        del sizes["head_dim"]
    config = AutoConfig.for_model(case.family, **sizes)
    model = tiny.randomised(lambda: AutoModelForCausalLM.from_config(config), seed)
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(tiny.VOCABULARY, (4, 32), generator=draw) for _ in range(3)]
    return _written(model, tiny.tokenizer(), batches, case.keep, folder / "tiny", **case.settings)


def write_smollm2(name: str, folder: Path) -> Path:
    """Compresses SmolLM2 on a little text, and exports it into a new folder."""
    model, tokenizer = grail.load_model(assets.smollm2())
    texts = assets.python_reference().values()
    batches = grail.token_batches(texts, tokenizer, tokens=1024, sequence_length=256)
    settings = {"selector": "wanda", "alpha": 1e-3, "drift_correction": 0.0}
    return _written(model, tokenizer, batches, SMOLLM2[name], folder / "smollm2", **settings)


def _written(
    model: Any, tokenizer: Any, batches: Any, keep: Mapping[str, Any], folder: Path, **settings: Any
) -> Path:
    report = grail.compress(model, batches, keep, tuple(keep), progress=False, **settings)
    uneven = bool(report.model["beyond_configuration"])
    return grail.export(model, tokenizer, folder, report, uneven=uneven)


def compared(name: str) -> dict[str, Any]:
    """Returns the row of a case; where vLLM refuses it, with its message."""
    with tempfile.TemporaryDirectory() as scratch:
        write = write_tiny if name in CASES else write_smollm2
        folder = write(name, Path(scratch))
        empty: dict[str, Any] = dict.fromkeys(VllmComparison.__dataclass_fields__, "")
        try:
            found = check_vllm(folder)
        except GrailError as error:
            words = str(error).partition("it says: ")[2] or str(error).partition(": ")[2]
            return {"model": name, **empty, "refused": words.partition(";")[0]}
    if found is None:
        raise SystemExit("vLLM is not installed: run this in the environment of bench.tools.vllm")
    return {"model": name, **asdict(found), "refused": ""}


def page_table(rows: Sequence[Row]) -> str:
    """Returns the table of docs/serving/transformers.md: a line for each row of the CSV."""
    lines = ["| model | class in vLLM | difference | same tokens |", "|---|---|---|---|"]
    for row in rows:
        cells = [row["model"], f"refused: {row['refused']}", "–", "–"]
        if not row["refused"]:
            share = float(row["difference"]) / float(row["largest"])
            least = min(float(row["agreement"]), float(row["greedy"]))
            cells = [row["model"], f"`{row['form']}`", f"{share:.1e}", f"{least:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Adds the rows that are missing."""
    names = [*CASES, *SMOLLM2]
    parser = CommandLine(__doc__, rows="vllm", takes="20 minutes on 2 cores")
    parser.add_argument("case", nargs="*", help=f"default all: {'; '.join(names)}")
    options = parser.read()
    asked = options.case or names
    if unknown := set(asked) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    table = Table(options.output, ("model",))
    for name in asked:
        if not table.measured(name):
            table.add(compared(name))


if __name__ == "__main__":
    main()
