"""Running out of memory: what it leaves behind, and what it says."""

import importlib
import subprocess
import sys

import pytest
import torch

import grail
import grail_kernels as gk
from grail.algebra.drift import Drift
from grail.calibrate.stream import Stream
from grail.errors import GrailError, OutOfMemoryError, StateError
from grail.runtime import memory
from tests.counting import injected
from tests.run.test_compress import assert_untouched, fingerprint

EXHAUSTED = RuntimeError(
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
H = 6


def failing_after(calls, owner, name, error, monkeypatch):
    """Lets a function fail with an error from its next call but so many."""
    owner = importlib.import_module(owner) if isinstance(owner, str) else owner
    whole, left = getattr(owner, name), calls

    def fails(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            injected("allocations that fail")
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)


@pytest.mark.parametrize(
    ("owner", "name", "calls", "remedy"),
    [
        (Stream, "run", 5, "smaller batches or shorter sequences"),
        (grail.Gram, "update", 5, "one kind of site at a time"),
        ("grail.run.solver", "stacked", 1, "such as wanda"),
        ("grail.algebra._fit", "Problem", 1, "fix alpha and drift_correction"),
    ],
    ids=["forward", "gram", "select", "solve"],
)
@pytest.mark.parametrize("error", [EXHAUSTED, torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_names_what_needs_less_and_leaves_the_model_alone(
    error, owner, name, calls, remedy, tiny_llama, tiny_batches, monkeypatch
):
    model = tiny_llama()
    before = fingerprint(model)
    failing_after(calls, owner, name, error, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=remedy) as caught:
        grail.compress(model, tiny_batches(), keep=0.5, sites=("mlp", "heads"), progress=False)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, GrailError)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("owner", "name", "calls", "remedy"),
    [
        (Stream, "run", 1, "smaller batches or shorter sequences"),
        ("grail.select.greedy", "errors", 1, "use a machine with more memory"),
        ("grail.run.network_loss", "divergence", 1, "fewer of them as probes"),
    ],
    ids=["forward", "search", "probe"],
)
def test_so_does_measuring_what_sites_cost(
    owner, name, calls, remedy, tiny_llama, tiny_batches, monkeypatch
):
    model = tiny_llama()
    before = fingerprint(model)
    failing_after(calls, owner, name, EXHAUSTED, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=remedy):
        grail.sensitivity(model, tiny_batches(), progress=False)
    assert_untouched(model, before)


def test_on_a_gpu_the_model_can_stay_on_the_host():
    gpu = torch.device("cuda")
    for movable in (False, True):
        with (
            pytest.raises(OutOfMemoryError) as caught,
            memory.explain_oom(gpu, lambda: "forward", movable),
        ):
            raise torch.OutOfMemoryError
        assert ("onload='cuda'" in str(caught.value)) is movable


def test_other_errors_pass_as_they_are():
    error = RuntimeError("something else")
    with (
        pytest.raises(RuntimeError) as caught,
        memory.explain_oom(torch.device("cpu"), lambda: "forward", False),
    ):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("owner", "name"), [(gk, "gram_"), (Drift, "update")], ids=["product", "drift"]
)
def test_a_gram_whose_update_ended_half_way_gives_nothing_out(owner, name, monkeypatch, tmp_path):
    gram = grail.Gram(H)
    x, drift = torch.randn(5, H), torch.randn(5, 2)
    gram.update(x, drift=drift)

    with monkeypatch.context() as patch:
        failing_after(0, owner, name, EXHAUSTED, patch)
        with pytest.raises(RuntimeError, match="can't allocate"):
            gram.update(x, drift=drift)
    for use in (
        gram.matrix,
        lambda: gram.sum,
        lambda: gram.update(x, drift=drift),
        lambda: gram.merge(grail.Gram(H)),
        lambda: grail.Gram(H).merge(gram),
        lambda: gram.save(tmp_path / "gram.state"),
    ):
        with pytest.raises(StateError, match="half-way"):
            use()


def test_memory_that_runs_out_before_anything_is_added_leaves_the_sums(monkeypatch):
    gram = grail.Gram(H)
    x = torch.randn(5, H)
    gram.update(x)
    before = gram.matrix()
    with monkeypatch.context() as patch:
        failing_after(0, torch.Tensor, "sum", EXHAUSTED, patch)
        with pytest.raises(RuntimeError, match="can't allocate"):
            gram.update(x)
    assert torch.equal(gram.matrix(), before)
    gram.update(x)
    assert gram.tokens == 10


LIMITED = """
import resource, torch, grail
from transformers import LlamaConfig, LlamaForCausalLM
from grail.run.fingerprint import model_fingerprint
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=97, hidden_size=256, intermediate_size=4096, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192,
)
model = LlamaForCausalLM(config).eval()
small = [torch.randint(97, (1, 64)) for _ in range(2)]
grail.compress(LlamaForCausalLM(config).eval(), small, keep=0.5, selector="wanda", progress=False)
before = model_fingerprint(model)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), most))
try:
    grail.compress(model, [torch.randint(97, (64, 4096))], keep=0.5, progress=False)
except grail.errors.OutOfMemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert model_fingerprint(model) == before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_process_that_really_runs_out_says_so_and_goes_on():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    injected("allocations that fail")
    assert "out of memory on cpu (forward)" in done.stdout
    assert "smaller batches" in done.stdout


MEMINFO = "MemTotal:       8000 kB\nMemFree:         500 kB\nMemAvailable:    4000 kB\n"


@pytest.mark.parametrize(
    ("limit", "used", "cached", "expected"),
    [
        (None, None, None, 4000 << 10),
        ("max", "1000", 0, 4000 << 10),
        ("3072000", "2048000", 1024, 1024000 + 1024),
        ("80000000000", "1000", 0, 4000 << 10),
    ],
)
def test_what_new_processes_can_take_is_the_kernel_s_estimate_or_the_container_s_rest(
    tmp_path, monkeypatch, limit, used, cached, expected
):
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    assert memory.available() == expected


def test_no_estimate_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "nowhere")
    assert memory.available() is None
    (tmp_path / "nowhere").write_text("MemTotal: 8000 kB")
    assert memory.available() is None
