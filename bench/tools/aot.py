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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS
from grail_kernels import absorb_triton, gram_tma, gram_triton, tuning

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

    target: str
    dtype: torch.dtype
    channels: int = 4096
    feature: str = "plain"
    aligned: bool = True  # threads load 16 bytes at once


class GramCase(Case):
    """One compilation of the Gram kernel."""

    @property
    def name(self) -> str:
        alignment = "aligned" if self.aligned else "unaligned"
        width = WIDTHS[self.channels]
        return f"gram/{self.target}/{TYPES[self.dtype]}/{alignment}/{width}/{self.feature}"

    @property
    def config(self) -> tuning.GramConfig:
        return tuning.gram_config(
            self.dtype,
            self.channels,
            weighted=self.feature == "weighted",
            gated=self.feature == "swiglu",
            aligned=self.aligned,
            architecture=self.target,
        )

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
        # An allocation is aligned; a view into one, like its width and strides, is if the caller's
        # is.
        sixteen = ["out_ptr", *(name for name in present if name != "gate_ptr")]
        if self.aligned:
            sixteen += ["x_ptr", "gate_ptr", "H", "out_stride", "stride_xm", "stride_xo"]
            sixteen += ["stride_xt", "stride_xc", *(["inner"] if by_pixels else [])]
        return _source(gram_triton._gram_kernel, types, sixteen)


class TmaCase(Case):
    """One compilation of the Gram kernel that reads through the tensor memory accelerator.

    The engine loads the blocks of x; `aligned` is the load of G.
    """

    @property
    def name(self) -> str:
        return f"gram_tma/{self.target}/{TYPES[self.dtype]}/{WIDTHS[self.channels]}/{self.feature}"

    @property
    def parts(self) -> int:
        """The number of bf16 parts of an activation."""
        return 3 if self.dtype == torch.float32 else 1

    @property
    def config(self) -> tuning.GramConfig:
        return tuning.tma_config(self.parts, self.channels, architecture=self.target)

    def source(self) -> ASTSource:
        laid = torch.bfloat16 if self.parts == 3 else self.dtype
        config, collects = self.config, self.feature == "collecting"
        block = [1, config.block_tokens, config.block_channels]
        types: dict[str, Any] = {"out_ptr": "*fp32", "x_desc": f"tensordesc<{TYPES[laid]}{block}>"}
        types |= {"sums_ptr": "*fp32" if collects else None}
        types |= {"nonfinite_ptr": "*i64" if collects else None}
        types |= dict.fromkeys(("H", "tokens", "matrices", "span"), "i32") | {"out_stride": "i64"}
        types |= {"H": 1} if self.channels == 1 else {}
        types |= gram_tma.constants(config, self.parts, laid)
        sixteen = ["out_ptr", "H", "tokens", "out_stride"]
        sixteen += ["sums_ptr", "nonfinite_ptr"] if collects else []
        return _source(gram_tma._gram_tma_kernel, types, sixteen)


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
        for dtype in TYPES:
            yield AbsorbCase(target, dtype)
        for dtype in TYPES:
            yield from _middle(GramCase(target, dtype))
            yield from _middle(AbsorbCase(target, dtype))
    yield TmaCase("sm_90", torch.bfloat16, 1, aligned=False)
    for dtype in TYPES:
        yield TmaCase("sm_90", dtype)
        yield TmaCase("sm_90", dtype, feature="collecting")
        yield TmaCase("sm_90", dtype, 64)
        yield from _middle(TmaCase("sm_90", dtype))


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
            options={"num_warps": case.config.warps, "num_stages": case.config.stages},
        )
        return _resources(case.target, compiled)


def _source(kernel: Any, types: dict[str, Any], sixteen: list[str]) -> ASTSource:
    """A kernel for arguments of `types`, or of a value known to the compiler.

    Args:
        kernel: the jitted function.
        types: a type such as "*fp32", or the value, of each argument.
        sixteen: arguments that are multiples of 16.
    """
    constexprs = {name: value for name, value in types.items() if not isinstance(value, str)}
    arguments = kernel.arg_names
    signature = {name: "constexpr" if name in constexprs else types[name] for name in arguments}
    attributes = {
        (arguments.index(name),): [["tt.divisibility", 16]]
        for name in sixteen
        if name not in constexprs
    }
    return ASTSource(kernel, signature, constexprs, attributes)


def _resources(target: str, compiled: Any) -> Resources:
    is_cuda = "cubin" in compiled.asm
    assembly = compiled.asm["ptx" if is_cuda else "amdgcn"]
    used = _cuda_usage(compiled.asm["cubin"]) if is_cuda else _hip_usage(assembly)
    patterns = {"tensor_core": TENSOR_CORE[target], **(_CUDA if is_cuda else _HIP)}
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in patterns.items()}
    return used | {"shared": compiled.metadata.shared} | counts


def _cuda_usage(cubin: bytes) -> Resources:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
        "uses no tensor cores": found["tensor_core"] == 0,
        "has atomics, so its bits may vary": found["atomics"] > 0,
        "reads aligned activations in pieces": case.aligned
        and not case.gathers
        and not tuned
        and found["narrow_loads"] > 0,
        "has no 16-byte loads": case.aligned and found["wide_loads"] == 0,
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
