"""Widths that quantisers and runtimes accept: `TARGETS` by name, and the rules of a width.

All hold for the input of a site's consumers, down_proj or o_proj: the dimension along which weights
are quantised in groups and along which tensor parallelism splits them. Sources:

- groups: llm-compressor 0.14 refuses columns that its group size does not divide; 128 is the usual
  group of GPTQ and AWQ.
- blocks: llama.cpp stores K-quants in blocks of 256 weights of a row, Q8_0, Q4_0 and Q4_1 in blocks
  of 32, and falls back to a larger type for other rows (ggml-org/llama.cpp issue 1919).
- tensor parallelism: vLLM gives each of n GPUs an equal share of channels or query heads, and whole
  key/value heads or a copy of one. Its Marlin kernels for 4 and 8 bits take shares that are a
  multiple of 128, whatever the group (vllm-project/vllm issue 9913), and a group lies on one GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from grail.arguments import did_you_mean, is_whole
from grail.errors import InputError

Multiple = int | str  # of channels, or the name of a target


@dataclass(frozen=True)
class Target:
    """A multiple of channels, and what it serves."""

    multiple: int
    serves: str


TARGETS: Mapping[str, Target] = {
    "gptq": Target(128, "GPTQ and AWQ in groups of 128"),
    "gguf": Target(256, "K-quants of llama.cpp; Q8_0, Q4_0 and Q4_1 need 32"),
    "vllm": Target(128 * 8, "groups of 128 and Marlin kernels, split among up to 8 GPUs"),
}


@dataclass(frozen=True)
class Rule:
    """A condition on a width: each of `parts` equal parts is a multiple of `multiple`.

    `use` and `number` name it: "groups: 128", "tensor parallel: 8".
    """

    use: Literal["groups", "GGUF blocks", "tensor parallel", "TP, groups of 128"]
    number: int
    parts: int
    multiple: int

    def __str__(self) -> str:
        return f"{self.use}: {self.number}"


RULES = (
    *(Rule("groups", size, 1, size) for size in (64, 128)),
    *(Rule("GGUF blocks", size, 1, size) for size in (32, 256)),
    *(Rule("tensor parallel", parts, parts, 1) for parts in (2, 4, 8)),
    *(Rule("TP, groups of 128", parts, parts, 128) for parts in (2, 4, 8)),  # TP: tensor parallel
)


def as_multiple(multiple: Multiple) -> int:
    """Returns the number that a name stands for, in any case; a number as it is.

    Raises:
        InputError: an unknown name, or a number that is no positive integer of 63 bits.
    """
    if isinstance(multiple, str) and (target := TARGETS.get(multiple.strip().lower())):
        return target.multiple
    if not is_whole(multiple) or not 0 < multiple < 1 << 63:
        known = ", ".join(f"{name} ({target.multiple})" for name, target in TARGETS.items())
        meant = did_you_mean(multiple, TARGETS) if isinstance(multiple, str) else ""
        raise InputError(
            f"multiple must be a positive integer less than 2**63, or the name of a target, "
            f"{known}; {meant}got {multiple!r}",
            page="docs/serving/index.md#which-widths-run-fast",
        )
    return multiple


def in_words() -> str:
    """Returns the names with what they stand for, as a part of a sentence."""
    words = (f"{name} is {t.multiple} ({t.serves})" for name, t in TARGETS.items())
    return ", ".join(words)
