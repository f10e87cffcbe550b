"""What the kernels compile to, against the committed record and the limits of each architecture."""

from __future__ import annotations

import json

import pytest

from grail_kernels.backend import interpreting

pytest.importorskip("triton")
if interpreting():
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from bench.tools import aot


def test_shipped_kernels_compile_to_what_is_recorded() -> None:
    problems = aot.check()
    assert not problems, "\n".join([*problems, "if meant: python -m bench.tools.aot --write"])


def test_the_record_keeps_every_limit() -> None:
    recorded = json.loads(aot.RECORD.read_text())["cases"]
    assert recorded.keys() == {case.name for case in aot.cases()}
    broken = [line for case in aot.cases() for line in aot.violations(case, recorded[case.name])]
    assert not broken


@pytest.mark.parametrize(
    ("resource", "value", "message"),
    [
        ("shared", 10**6, "shared memory"),
        ("stack", 1000, "spills 1000 B"),
        ("tensor_core", 0, "no tensor cores"),
        ("atomics", 1, "atomics"),
        ("narrow_loads", 3, "in pieces"),
        ("wide_loads", 0, "no 16-byte loads"),
    ],
)
def test_each_limit_is_reported(resource: str, value: int, message: str) -> None:
    case = next(aot.cases())
    found = json.loads(aot.RECORD.read_text())["cases"][case.name] | {resource: value}
    assert [line for line in aot.violations(case, found) if message in line]


def test_reductions_are_for_the_wide_kernel_alone_and_its_chains_do_not_wait() -> None:
    case = next(case for case in aot.cases() if isinstance(case, aot.WideCase))
    found = json.loads(aot.RECORD.read_text())["cases"][case.name]
    assert found["atomics"] > 0
    assert not aot.violations(case, found)
    (waits,) = aot.violations(case, found | {"full_waits": found["full_waits"] + 1})
    assert "inside a chain" in waits


def test_a_changed_number_is_named() -> None:
    before = {"a": {"registers": 100, "stack": 0}, "b": {"registers": 1, "stack": 0}}
    now = {"a": {"registers": 120, "stack": 0}, "c": {"registers": 1, "stack": 0}}
    assert aot.differences(before, now) == [
        "a: registers 100 -> 120",
        "b: not compiled",
        "c: not recorded",
    ]
