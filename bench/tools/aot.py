"""Resources of every shipped Triton kernel, compiled without a GPU.

    python -m bench.tools.aot            compile everything, print differences from the record
    python -m bench.tools.aot --write    compile everything and write bench/results/aot.json

The record is compared where it is of the same version of Triton. The limits of `violations` hold
for all versions, those of speed for launches that nobody measured.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS
from grail_kernels import (
    absorb_triton,
    gram_blocks,
    gram_gate,
    gram_halves,
    gram_tma,
    gram_triton,
    gram_wide,
    panel_triton,
    tuning,
)
from grail_kernels.tiles import STRIP_ROWS

RECORD = RESULTS / "aot.json"
Resources = dict[str, int]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory (LDS) that one program may take.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_CORE = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "gfx942": r"v_mfma",
}
# Bytes of an asynchronous copy stand in its operands, those of a plain load in its name.
_CUDA = {
    "wide_loads": r"cp\.async\.[^;]*, 0x10,|ld\.global[^ ]*\.v4\.b32|ld\.global[^ ]*\.v2\.b64",
    "narrow_loads": r"cp\.async\.[^;]*, 0x[48],|ld\.global[^ ]*\.b16 ",
    "atomics": r"\b(?:atom|red)\.global",
}
_HIP = {
    "wide_loads": r"(?:global|buffer)_load_dwordx4",
    "narrow_loads": r"(?:global|buffer)_load_(?:ushort|short_d16)",
    "atomics": r"(?:global|buffer)_atomic",
}
# Tensor core instructions of a chain of the kernel for wide matrices, of 16 tokens each.
_CHAIN_PRODUCTS = tuning.CHAIN_TOKENS // 16
# Bytes of spilled registers that are accepted: two dozen registers, where a tile that does not fit
# spills a kilobyte.
STACK_LIMIT = 96

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
WIDTHS = {1: "single", 64: "narrow", 1024: "middle", 4096: "wide"}
POINTERS = {
    "gate_ptr": "*{x}",
    "mask_ptr": "*u8",
    "weights_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "nonfinite_ptr": "*i64",
    "offsets_ptr": "*i64",
}
FEATURES = {
    "plain": (),
    "collecting": ("mask_ptr", "sums_ptr", "nonfinite_ptr"),
    "weighted": ("weights_ptr", "sums_ptr", "nonfinite_ptr"),
    "ragged": ("offsets_ptr", "sums_ptr", "nonfinite_ptr"),
    "swiglu": ("gate_ptr", "sums_ptr", "nonfinite_ptr"),
    "pixels": ("sums_ptr", "nonfinite_ptr"),
}


@dataclass(frozen=True)
class Case:
    """One compilation of a kernel.

    `name`: its key in the record; `config`: the launch that the shipped table picks; `source()`:
    the kernel with the argument types and the alignment that Triton sees in a launch.
    """

    gathers: ClassVar[bool] = False
    multiplies: ClassVar[bool] = True  # on tensor cores
    loads: ClassVar[bool] = True  # by its threads
    reduces: ClassVar[bool] = False

    target: str
    dtype: torch.dtype = torch.float32
    channels: int = 4096
    feature: str = "plain"
    aligned: bool = True  # threads load 16 bytes at once

    @property
    def options(self) -> dict[str, int]:
        """The options of the compiler."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages}


class GramCase(Case):
    """One compilation of the Gram kernel."""

    @property
    def name(self) -> str:
        alignment = "aligned" if self.aligned else "unaligned"
        width = WIDTHS[self.channels]
        return f"gram/{self.target}/{TYPES[self.dtype]}/{alignment}/{width}/{self.feature}"

    @property
    def launches(self) -> tuning.Launches:
        """The row of the table for such a call."""
        return tuning.gram_launches(
            self.dtype,
            self.channels,
            weighted=self.feature == "weighted",
            gated=self.feature == "swiglu",
            aligned=self.aligned,
            architecture=self.target,
        )

    @property
    def config(self) -> tuning.GramConfig:
        return self.launches[-1]

    def source(self) -> ASTSource:
        by_pixels = self.feature == "pixels"
        x = TYPES[self.dtype]
        present = FEATURES[self.feature]
        types: dict[str, Any] = {"out_ptr": "*fp32", "x_ptr": f"*{x}"}
        types |= {n: t.format(x=x) if n in present else None for n, t in POINTERS.items()}
        sizes = ("H", "inner", "outer", "matrices", "span", "stride_xm", "stride_xo")
        types |= dict.fromkeys((*sizes, "stride_xt", "stride_xc"), "i32") | {"out_stride": "i64"}
        types |= {"stride_xt" if by_pixels else "stride_xc": 1}
        types |= {"H": 1} if self.channels == 1 else {}
        weighted = self.feature == "weighted"
        types |= gram_triton.constants(self.config, self.dtype, weighted, repeats=by_pixels)
        types |= {"STORES": False}
        # An allocation is aligned; a view into one, like its width and strides, is if the caller's
        # is.
        sixteen = ["out_ptr", *(name for name in present if name != "gate_ptr")]
        if self.aligned:
            sixteen += ["x_ptr", "gate_ptr", "H", "out_stride", "stride_xm", "stride_xo"]
            sixteen += ["stride_xt", "stride_xc", *(["inner"] if by_pixels else [])]
        return _source(gram_triton._gram_kernel, types, sixteen)


class TmaCase(GramCase):
    """One compilation of the Gram kernel that reads through the tensor memory accelerator.

    The engine loads the blocks of x; `aligned` is the load of G.
    """

    @property
    def is_listed(self) -> bool:
        """Returns whether the table has a launch of it for such a call."""
        return any(config.kernel == "tma" for config in self.launches)

    @property
    def name(self) -> str:
        return f"gram_tma/{self.target}/{TYPES[self.dtype]}/{WIDTHS[self.channels]}/{self.feature}"

    @property
    def parts(self) -> int:
        """The number of bf16 parts of an activation."""
        return 3 if self.dtype == torch.float32 else 1

    @property
    def config(self) -> tuning.GramConfig:
        return next(config for config in self.launches if config.kernel == "tma")

    def source(self) -> ASTSource:
        laid = torch.bfloat16 if self.parts == 3 else self.dtype
        config, collects = self.config, self.feature == "collecting"
        block = [1, config.block_tokens, config.block_channels]
        types: dict[str, Any] = {"out_ptr": "*fp32", "x_desc": f"tensordesc<{TYPES[laid]}{block}>"}
        types |= {"sums_ptr": "*fp32" if collects else None, "inverse_ptr": None}
        types |= {"nonfinite_ptr": "*i64" if collects else None}
        types |= dict.fromkeys(("H", "tokens", "matrices", "span"), "i32") | {"out_stride": "i64"}
        types |= {"H": 1} if self.channels == 1 else {}
        types |= gram_tma.constants(config, self.parts, laid) | {"STORES": False}
        sixteen = ["out_ptr", "H", "tokens", "out_stride"]
        sixteen += ["sums_ptr", "nonfinite_ptr"] if collects else []
        return _source(gram_tma._gram_tma_kernel, types, sixteen)


class HalvesCase(TmaCase):
    """One compilation of the kernel of `TmaCase` for fp32 in two fp16 parts, which no row has."""

    @property
    def name(self) -> str:
        return f"gram_halves/{self.target}/{WIDTHS[self.channels]}/{self.feature}"

    @property
    def config(self) -> tuning.GramConfig:
        edge, warps = (64, 4) if self.channels <= 64 else (128, 8)
        return tuning.GramConfig("halves", 32, edge, 8, warps, 4)

    def source(self) -> ASTSource:
        config, collects = self.config, self.feature == "collecting"
        block = [1, config.block_tokens, config.block_channels]
        types: dict[str, Any] = {"out_ptr": "*fp32", "x_desc": f"tensordesc<fp16{block}>"}
        types |= {"sums_ptr": "*fp32" if collects else None, "inverse_ptr": "*fp32"}
        types |= {"nonfinite_ptr": "*i64" if collects else None}
        types |= dict.fromkeys(("H", "tokens", "matrices", "span"), "i32") | {"out_stride": "i64"}
        types |= gram_tma.constants(config, 2, torch.float16) | {"STORES": False}
        sixteen = ["out_ptr", "inverse_ptr", "H", "tokens", "out_stride"]
        sixteen += ["sums_ptr", "nonfinite_ptr"] if collects else []
        return _source(gram_tma._gram_tma_kernel, types, sixteen)


class LayCase(Case):
    """One compilation of a kernel that lays activations out for the copy engine.

    Features: "parts" as `gram_tma` reads them, "halves" as `gram_halves` does, and "largest", which
    finds the scales of those.
    """

    multiplies = False

    @property
    def name(self) -> str:
        return f"gram_lay/{self.target}/{TYPES[self.dtype]}/{self.feature}"

    @property
    def config(self) -> tuning.GramConfig:
        return replace(tuning.FORMING, stages=3)  # Triton's own warps and stages

    def source(self) -> ASTSource:
        kernel, fixed = {
            "parts": (gram_tma._lay_kernel, {"PARTS": 3 if self.dtype == torch.float32 else 1}),
            "halves": (gram_halves._lay_halves_kernel, {"SEARCHERS": gram_halves._SEARCHERS}),
            "largest": (gram_halves._largest_kernel, {"SEARCHERS": gram_halves._SEARCHERS}),
        }[self.feature]
        laid = "fp16" if self.feature == "halves" or self.dtype == torch.float16 else "bf16"
        types: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
        types |= dict.fromkeys(("largest_ptr", "inverse_ptr"), "*fp32") | {"laid_ptr": f"*{laid}"}
        types |= {"x_ptr": f"*{TYPES[self.dtype]}", "mask_ptr": "*u8", "stride_xc": 1}
        types |= {**gram_halves._BLOCK, **fixed}
        sixteen = [n for n in kernel.arg_names if n.endswith("_ptr") or n.startswith("stride_")]
        return _source(kernel, types, [*sixteen, "H", *({"width"} & {*kernel.arg_names})])


class FormCase(Case):
    """One compilation of the kernel that stores the activation of a gate."""

    multiplies = False

    @property
    def name(self) -> str:
        return f"gram_gate/{self.target}/{TYPES[self.dtype]}"

    @property
    def config(self) -> tuning.GramConfig:
        return tuning.FORMING

    def source(self) -> ASTSource:
        kernel, pointers = gram_gate._form_kernel, ("hidden_ptr", "x_ptr", "gate_ptr")
        types: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32")
        types |= dict.fromkeys(pointers, f"*{TYPES[self.dtype]}") | {"stride_xc": 1, "stride_gc": 1}
        types |= {"BLOCK_T": self.config.block_tokens, "BLOCK_H": self.config.block_channels}
        strides = [name for name in kernel.arg_names if name.startswith("stride_")]
        return _source(kernel, types, [*pointers, "H", *strides])


class SplitsCase(Case):
    """One compilation of the kernel that adds up what splits of the tokens have left."""

    multiplies = False

    @property
    def name(self) -> str:
        return f"gram_splits/{self.target}"

    @property
    def config(self) -> tuning.GramConfig:
        return replace(tuning.FORMING, stages=3)  # Triton's own warps and stages

    def source(self) -> ASTSource:
        kernel = gram_blocks._add_splits_kernel
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        types: dict[str, Any] = dict.fromkeys(pointers, "*fp32")
        types |= {name: "*i64" for name in pointers if name.startswith("nonfinite")}
        types |= dict.fromkeys(("H", "matrices", "splits"), "i32") | {"out_stride": "i64"}
        types |= {"STRIP": STRIP_ROWS, "BLOCK_H": gram_blocks._ADDED_EDGE}
        return _source(kernel, types, [*pointers, "H", "out_stride"])


class WideCase(Case):
    """One compilation of the Gram kernel for wide matrices, as trials launch it first.

    The engine loads the activations, and G is reduced to: an element by one program.
    """

    loads = False
    reduces = True

    @property
    def name(self) -> str:
        return f"gram_wide/{self.target}/{TYPES[self.dtype]}"

    @property
    def config(self) -> tuning.GramConfig:
        return tuning.GramConfig("wide", 64, 256, group=4, warps=4, stages=8)

    @property
    def options(self) -> dict[str, int]:
        return gram_wide.OPTIONS

    def source(self) -> ASTSource:
        fixed = gram_wide.constants(self.config)
        return wide_source(gram_wide._gram_wide_kernel, self.dtype, gram_wide.COLUMN_BLOCK, fixed)


def wide_source(
    kernel: Any, dtype: torch.dtype, columns: list[int], constants: Mapping[str, Any]
) -> ASTSource:
    """A kernel with the arguments of `gram_wide`, which copies such blocks of columns."""
    types: dict[str, Any] = dict.fromkeys(("out_ptr", "shares_ptr"), "*fp32")
    for name, block in (("x_rows_desc", gram_wide.ROW_BLOCK), ("x_columns_desc", columns)):
        layout = gram_wide.layout_of(block, dtype)
        types[name] = f"tensordesc<{TYPES[dtype]}{block},{layout!r}>"
    types |= dict.fromkeys(("H", "chains", "whole", "shared", "share"), "i32") | constants
    return _source(kernel, types, ["out_ptr", "shares_ptr", "H"], GluonASTSource)


class AbsorbCase(Case):
    """One compilation of the absorb kernel, which copies its weights and so has them aligned."""

    gathers = True

    @property
    def name(self) -> str:
        width = "" if self.channels > 1024 else "/middle"
        return f"absorb/{self.target}/{TYPES[self.dtype]}{width}"

    @property
    def config(self) -> tuning.AbsorbConfig:
        return tuning.absorb_config(self.dtype, self.channels, self.target)

    def source(self) -> ASTSource:
        kernel = absorb_triton._absorb_kernel
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        types: dict[str, Any] = dict.fromkeys(pointers, "*i64") | dict.fromkeys("OKD", "i32")
        types |= {"out_ptr": "*fp32", "weight_ptr": f"*{TYPES[self.dtype]}", "gram_ptr": "*fp32"}
        types |= absorb_triton.constants(self.config, self.dtype)
        return _source(kernel, types, [*pointers, "D"])


class PanelCase(Case):
    """One compilation of the panel of pivots, which works on vectors alone."""

    multiplies = False

    @property
    def name(self) -> str:
        return f"panel/{self.target}/{self.feature}"

    @property
    def config(self) -> panel_triton.PanelConfig:
        return panel_triton.CONFIG

    def source(self) -> ASTSource:
        kernel = panel_triton._panel_kernel
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        types: dict[str, Any] = dict.fromkeys(pointers, "*fp32") | dict.fromkeys("NP", "i32")
        types |= {"places_ptr": "*i64", "limits_ptr": "*i64"}
        types |= panel_triton.constants(64, 128, least=self.feature == "least")
        return _source(kernel, types, [*pointers, "N", "P"])


def cases() -> Iterator[Case]:
    """Every launch configuration, and every fused feature with the activations it is meant for."""
    for target in TARGETS:
        for dtype in TYPES:
            yield GramCase(target, dtype)
            yield GramCase(target, dtype, 64)
            yield GramCase(target, dtype, feature="collecting", aligned=False)
        yield GramCase(target, torch.bfloat16, 1, aligned=False)  # a width that is a constant
        for feature in FEATURES:
            if feature != "plain":
                yield GramCase(target, torch.bfloat16, feature=feature)
        for feature in ("collecting", "swiglu", "pixels"):
            yield GramCase(target, torch.float32, feature=feature)
        yield GramCase(target, torch.bfloat16, 64, "collecting")  # heads
        yield SplitsCase(target)
        for dtype in TYPES:
            yield FormCase(target, dtype)
            yield AbsorbCase(target, dtype)
        for dtype in TYPES:
            yield from _middle(GramCase(target, dtype))
            yield from _middle(AbsorbCase(target, dtype))
        for feature in ("largest", "least"):
            yield PanelCase(target, torch.float32, feature=feature, aligned=False)
    yield WideCase("sm_90", torch.bfloat16)
    yield WideCase("sm_90", torch.float16)
    yield TmaCase("sm_90", torch.bfloat16, 1, aligned=False)
    for dtype in TYPES:
        yield TmaCase("sm_90", dtype)
        yield TmaCase("sm_90", dtype, feature="collecting")
        for channels in (64, 1024):
            if TmaCase("sm_90", dtype, channels).is_listed:
                yield TmaCase("sm_90", dtype, channels)

    for dtype in TYPES:
        yield LayCase("sm_90", dtype, feature="parts")
    for feature in ("halves", "largest"):
        yield LayCase("sm_90", torch.float32, feature=feature)
    for channels in (64, 4096):
        yield HalvesCase("sm_90", torch.float32, channels, "collecting")


def _middle(wide: Case) -> Iterator[Case]:
    """The case of a matrix of middle width, where its row is not that of a wide one."""
    middle = replace(wide, channels=1024)
    if middle.config != wide.config:
        yield middle


def compile_case(case: Case) -> Resources:
    """The resources of a case; nothing is read from or left in Triton's cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        compiled = triton.compile(
            case.source(),
            target=TARGETS[case.target],
            options=case.options,
        )
        found = _resources(case.target, compiled)
        return found | _full_waits(compiled.asm["cubin"]) if case.reduces else found


def _source(
    kernel: Any, types: dict[str, Any], sixteen: list[str], kind: type[ASTSource] = ASTSource
) -> ASTSource:
    """A kernel for arguments of `types`, or of a value known to the compiler.

    Args:
        kernel: the jitted function.
        types: a type such as "*fp32", or the value, of each argument.
        sixteen: arguments that are multiples of 16.
        kind: of the source, by the language of the kernel.
    """
    constexprs = {name: value for name, value in types.items() if not isinstance(value, str)}
    arguments = kernel.arg_names
    signature = {name: "constexpr" if name in constexprs else types[name] for name in arguments}
    attributes = {
        (arguments.index(name),): [["tt.divisibility", 16]]
        for name in sixteen
        if name not in constexprs
    }
    return kind(kernel, signature, constexprs, attributes)


def _resources(target: str, compiled: Any) -> Resources:
    is_cuda = "cubin" in compiled.asm
    assembly = compiled.asm["ptx" if is_cuda else "amdgcn"]
    used = _cuda_usage(compiled.asm["cubin"]) if is_cuda else _hip_usage(assembly)
    patterns = {"tensor_core": TENSOR_CORE[target], **(_CUDA if is_cuda else _HIP)}
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in patterns.items()}
    return used | {"shared": compiled.metadata.shared} | counts


def _dump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _full_waits(cubin: bytes) -> Resources:
    """The waits, in machine code, until no product of a group of warps is in flight."""
    return {
        "full_waits": len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", _dump(cubin, "-sass")))
    }


def _cuda_usage(cubin: bytes) -> Resources:
    output = _dump(cubin, "--dump-resource-usage")
    return {"registers": _number(r"REG:(\d+)", output), "stack": _number(r"STACK:(\d+)", output)}


def _hip_usage(assembly: str) -> Resources:
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", assembly),
        "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise RuntimeError(f"the compiler's output has no {pattern}")
    return int(found[1])


def violations(case: Case, found: Resources) -> list[str]:
    """The limits that hold for every version of Triton, as sentences; empty if all do."""
    limit = SHARED_LIMITS[case.target]
    # What a launch of the architecture's own spills or reads in pieces was in its measured time.
    tuned = replace(case, target=tuning.DEFAULT).config != case.config
    too_much = f"takes {found['shared']} B of shared memory, the limit is {limit}"
    rules = {
        too_much: found["shared"] > limit,
        f"spills {found['stack']} B": not tuned and found["stack"] > STACK_LIMIT,
        "uses no tensor cores": case.multiplies and found["tensor_core"] == 0,
        "has atomics, so its bits may vary": not case.reduces and found["atomics"] > 0,
        "waits for products inside a chain": found.get("full_waits", 0) * _CHAIN_PRODUCTS
        > found["tensor_core"],
        "reads aligned activations in pieces": case.aligned
        and not case.gathers
        and not tuned
        and found["narrow_loads"] > 0,
        "has no 16-byte loads": case.loads and case.aligned and found["wide_loads"] == 0,
    }
    return [f"{case.name} {rule}" for rule, broken in rules.items() if broken]


def differences(recorded: dict[str, Resources], found: dict[str, Resources]) -> list[str]:
    """Differences from the record, one line a number."""
    lines = []
    for name in sorted(recorded.keys() | found.keys()):
        before, now = recorded.get(name), found.get(name)
        if before is None or now is None:
            lines.append(f"{name}: {'not recorded' if before is None else 'not compiled'}")
            continue
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            lines.append(f"{name}: {', '.join(changed)}")
    return lines


def compile_all() -> dict[Case, Resources]:
    """Every case, two at a time."""
    everything = list(cases())
    with ProcessPoolExecutor(2) as pool:
        return dict(zip(everything, pool.map(compile_case, everything, chunksize=4), strict=True))


def check(write: bool = False) -> list[str]:
    """Everything wrong with what the kernels compile to now, which may become the record."""
    found = compile_all()
    problems = [line for case, resources in found.items() for line in violations(case, resources)]
    now = {case.name: resources for case, resources in found.items()}
    if write:
        record = {"triton": triton.__version__, "cases": now}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(RECORD.read_text())
    if record["triton"] == triton.__version__:
        problems += differences(record["cases"], now)
    return problems


def main() -> int:
    """Compiles, compares or writes; the exit code is 1 if anything is wrong."""
    parser = CommandLine(
        __doc__,
        writes="nothing; with --write bench/results/aot.json",
        takes="minutes on 2 cores; no GPU is needed",
    )
    parser.add_argument("--write", action="store_true", dest="record", help="write the record")
    problems = check(write=parser.read().record)
    print("\n".join(problems) or "nothing to report")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
