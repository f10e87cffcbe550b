import pytest
import torch
from torch import nn

import grail
import grail_kernels as gk
from grail.algebra.sums import Buffer
from grail.errors import (
    EmptyCalibrationError,
    InputError,
    ModelError,
    NonFiniteError,
    StateError,
)
from grail.runtime import state

H = 20
EPS = torch.finfo(torch.float32).eps


def bound(x: torch.Tensor) -> torch.Tensor:
    """Reference BLAS's syrk test: |G − G64| ≤ 16 eps |X|ᵀ|X|, componentwise."""
    return 16 * EPS * x.double().abs().T @ x.double().abs()


def test_sums_and_counts_equal_fp64_over_any_chunking():
    x = torch.randn(300, H)
    gram = grail.Gram(H)
    for chunk in x.split([1, 99, 0, 200]):
        gram.update(chunk.view(1, -1, H))
    assert ((gram.matrix().double() - x.double().T @ x.double()).abs() <= bound(x)).all()
    torch.testing.assert_close(gram.sum, x.sum(0), atol=1e-4, rtol=1e-5)
    assert torch.equal(gram.energy, gram.matrix().diagonal())
    assert gram.tokens == 300
    assert torch.equal(gram.matrix(), gram.matrix().T)


def test_a_masked_token_is_a_token_that_was_never_there():
    x, mask = torch.randn(4, 7, H), torch.rand(4, 7) > 0.4
    x[~mask] = float("nan")
    masked, removed = grail.Gram(H), grail.Gram(H)
    masked.update(x, mask)
    removed.update(x[mask])
    assert torch.equal(masked.matrix(), removed.matrix())
    assert torch.equal(masked.sum, removed.sum)
    assert masked.tokens == removed.tokens == int(mask.sum())


def test_merge_adds_sums_and_counts():
    x, y = torch.randn(50, H), torch.randn(30, H)
    first, second, empty = grail.Gram(H), grail.Gram(H), grail.Gram(H)
    first.update(x)
    second.update(y)
    expected = first.matrix() + second.matrix()
    empty.merge(first)
    empty.merge(second)
    empty.merge(grail.Gram(H))
    assert torch.equal(empty.matrix(), expected)
    assert empty.tokens == 80
    assert first.tokens == 50


BUFFER = 64  # tokens; with 2H = 40, batches of up to 8 fp32 or 15 bf16 tokens are worth the wait


@pytest.fixture
def flushes(monkeypatch):
    """How many tokens entered G at a time."""
    sizes = []
    multiply = gk.gram_

    def counting(out, x, **rest):
        sizes.append(x.shape[:-1].numel())
        return multiply(out, x, **rest)

    monkeypatch.setattr(gk, "gram_", counting)
    return sizes


def test_small_batches_wait_until_they_fill_the_buffer(flushes):
    x = torch.randn(17, 8, H)
    gram = grail.Gram(H, buffer=BUFFER)
    for batch in x:
        gram.update(batch)
    assert flushes == [BUFFER, BUFFER]
    gram.update(torch.zeros(40, H))  # copying it would cost more than touching G
    assert flushes == [BUFFER, BUFFER, 40]


def merged(gram: grail.Gram) -> torch.Tensor:
    empty = grail.Gram(H)
    empty.merge(gram)
    return empty.matrix()


@pytest.mark.parametrize(
    "read",
    [lambda g: g.matrix(), lambda g: g.energy, lambda g: g.sum, lambda g: g.tokens, merged],
    ids=["matrix", "energy", "sum", "tokens", "merge"],
)
def test_every_result_has_the_tokens_that_wait(read):
    x = torch.randint(-9, 9, (7, H)).float()  # sums of small integers are exact in any order
    whole, waiting = grail.Gram(H), grail.Gram(H, buffer=BUFFER)
    whole.update(x)
    waiting.update(x[:3])
    waiting.update(x[3:])
    assert torch.equal(torch.as_tensor(read(waiting)), torch.as_tensor(read(whole)))


def test_reading_between_batches_counts_none_twice():
    x, gram = torch.randn(5, 6, H), grail.Gram(H, buffer=BUFFER)
    for batch in x:
        gram.update(batch)
        gram.matrix()
    x = x.flatten(0, 1)
    assert ((gram.matrix().double() - x.double().T @ x.double()).abs() <= bound(x)).all()


def test_a_batch_that_waits_is_the_callers_to_overwrite():
    x, gram = torch.randn(7, H), grail.Gram(H, buffer=BUFFER)
    reused = x.clone()
    gram.update(reused)
    reused.fill_(1e30)
    assert ((gram.matrix().double() - x.double().T @ x.double()).abs() <= bound(x)).all()


def test_a_batch_of_another_dtype_keeps_its_precision(flushes):
    x = torch.randn(14, H)
    gram = grail.Gram(H, buffer=BUFFER)
    gram.update(x[:7].bfloat16())
    gram.update(x[7:])
    x = torch.cat([x[:7].bfloat16().float(), x[7:]])
    assert ((gram.matrix().double() - x.double().T @ x.double()).abs() <= bound(x)).all()
    assert flushes == [7, 7]


def test_the_buffer_keeps_masks_beside_the_tokens():
    # What a GPU does, where counting masked tokens would stall the stream.
    x, mask = torch.randn(2, 7, H), torch.rand(7) > 0.4
    x[1, ~mask] = float("nan")
    buffer = Buffer(BUFFER, x)
    buffer.append(x[0], None)
    buffer.append(x[1], mask)
    tokens, counts = buffer.content()
    assert torch.equal(tokens[counts], torch.cat([x[0], x[1, mask]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_activation_is_refused_and_nothing_is_added(value):
    gram = grail.Gram(H, name="model.layers.3.mlp")
    gram.update(torch.randn(10, H))
    before, tokens = gram.matrix(), gram.tokens
    bad = torch.randn(10, H)
    bad[2, 5] = bad[3, 5] = bad[4, 9] = value
    with pytest.raises(NonFiniteError, match=r"model\.layers\.3\.mlp") as caught:
        gram.update(bad)
    assert caught.value.channels == (5, 9)
    assert caught.value.count == 3
    assert torch.equal(gram.matrix(), before)
    assert gram.tokens == tokens


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("drifting", [False, True])
def test_tokens_with_non_finite_values_are_dropped_on_request(masked, drifting, tmp_path):
    x, drift = torch.randn(4, 10, H), torch.randn(4, 10, 3)
    mask = torch.rand(4, 10) > 0.3
    mask[0, 1] = mask[2, 2] = mask[3, 7] = True
    x[0, 1, 2], x[2, 2, 0] = float("nan"), float("inf")
    x[1] = x[1].where(mask[1, :, None], float("-inf"))  # does not count, so is not dropped either
    drift[3, 7, 1] = float("nan")
    whole = x.isfinite().all(-1) & (drift.isfinite().all(-1) | (not drifting))
    counted = mask & whole if masked else whole
    gram, expected = grail.Gram(H, non_finite="drop"), grail.Gram(H)
    for rows in range(4):
        beside = {"mask": mask[rows]} if masked else {}
        beside |= {"drift": drift[rows]} if drifting else {}
        gram.update(x[rows], **beside)
    expected.update(x[counted], drift=drift[counted] if drifting else None)
    assert gram.tokens == expected.tokens == int(counted.sum())
    assert gram.dropped == int((mask & ~whole).sum() if masked else (~whole).sum()) > 1
    torch.testing.assert_close(gram.matrix(), expected.matrix(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram.sum, expected.sum, rtol=1e-5, atol=1e-5)
    if drifting:
        torch.testing.assert_close(gram.drift.cross, expected.drift.cross, rtol=1e-5, atol=1e-5)
    gram.merge(gram)
    gram.save(tmp_path / "gram.state")
    assert grail.Gram.load(tmp_path / "gram.state").dropped == gram.dropped


def test_a_gram_of_dropped_tokens_alone_says_so():
    gram = grail.Gram(H, non_finite="drop")
    gram.update(torch.full((5, H), float("nan")))
    with pytest.raises(EmptyCalibrationError, match=r"5 with NaN or Inf were dropped"):
        gram.matrix()
    with pytest.raises(InputError, match="refuse, drop, propagate; got"):
        grail.Gram(H, non_finite="ignore")


def test_large_finite_values_are_counted_until_their_squares_overflow():
    gram = grail.Gram(H)
    gram.update(torch.full((2, H), 3e38))  # the channel sum overflows, no value is infinite
    with pytest.raises(NonFiniteError, match="beyond fp32"):
        gram.matrix()


@pytest.mark.parametrize("size", [1e-20, 1e-25, 1e-40])
def test_activations_whose_squares_underflow_are_refused(size):
    gram = grail.Gram(H)
    gram.update(torch.full((50, H), size))
    with pytest.raises(InputError, match="scale the activations up"):
        gram.matrix()


def test_a_quiet_channel_beside_loud_ones_is_no_underflow():
    gram = grail.Gram(H)
    gram.update(torch.ones(50, H).index_fill(1, torch.tensor(3), 1e-30))
    assert gram.energy.tolist() == [50.0] * 3 + [0.0] + [50.0] * (H - 4)


def test_no_token_is_an_error_when_read():
    gram = grail.Gram(H)
    assert gram.tokens == 0
    gram.update(torch.empty(0, H))
    with pytest.raises(EmptyCalibrationError):
        gram.matrix()
    with pytest.raises(EmptyCalibrationError):
        _ = gram.energy


@pytest.mark.parametrize(
    "call",
    [
        lambda g: g.update(torch.randn(3, H + 1)),
        lambda g: g.update(torch.tensor(1.0)),
        lambda g: g.update(torch.randn(3, H, dtype=torch.float64)),
        lambda g: g.update(torch.ones(3, H, dtype=torch.int64)),
        lambda g: g.update(torch.randn(3, H), torch.ones(3)),
        lambda g: g.update(torch.randn(3, H), torch.ones(2, dtype=torch.bool)),
        lambda g: g.merge(grail.Gram(H + 1)),
        lambda g: grail.Gram(0),
        lambda g: grail.Gram(2.5),
        lambda g: grail.Gram(H, buffer=-1),
        lambda g: g.update(torch.empty(3, H, device="meta")),
    ],
    ids=[
        "channels",
        "scalar",
        "fp64",
        "int",
        "mask dtype",
        "mask shape",
        "merge",
        "zero",
        "float",
        "buffer",
        "device",
    ],
)
def test_input_that_does_not_fit_changes_nothing(call):
    gram = grail.Gram(H)
    gram.update(torch.randn(10, H))
    before = gram.matrix()
    with pytest.raises(InputError):
        call(gram)
    assert torch.equal(gram.matrix(), before)
    assert gram.tokens == 10


def test_the_input_is_read_only():
    x = torch.randn(5, H)
    copy = x.clone()
    grail.Gram(H).update(x)
    assert torch.equal(x, copy)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_gpu_counts_batches_that_the_caller_overwrites_at_once(where):
    channels = 1024
    x, mask = torch.randn(30, 300, channels).bfloat16(), torch.rand(30, 300) > 0.4
    gram = grail.Gram(channels, device="cuda")
    batch, counts = x[0].to(where, copy=True), mask[0].to(where, copy=True)
    for source, chosen in zip(x, mask, strict=True):
        batch.copy_(source)
        counts.copy_(chosen)
        gram.update(batch, counts)
    exact = x[mask].double()
    assert ((gram.matrix().cpu().double() - exact.T @ exact).abs() <= bound(exact)).all()
    assert gram.tokens == int(mask.sum())


@pytest.mark.gpu
@gpu
def test_a_gpu_refuses_non_finite_values_when_read():
    gram = grail.Gram(H, device="cuda")
    x = torch.randn(10, H, device="cuda")
    x[2, 5] = float("nan")
    gram.update(x)
    with pytest.raises(NonFiniteError) as caught:
        gram.matrix()
    assert caught.value.channels == (5,)


def saved_and_loaded(gram: grail.Gram, path) -> grail.Gram:
    gram.save(path)
    return grail.Gram.load(path)


def test_a_saved_gram_goes_on_bit_for_bit(tmp_path):
    # More channels than one strip of the packed form, so that its scratch part is kept, too.
    x, drift = torch.randn(40, 300), torch.randn(40, 7)
    gram = grail.Gram(300, name="model.layers.3.mlp", buffer=BUFFER)
    gram.update(x[:30], drift=drift[:30])
    loaded = saved_and_loaded(gram, tmp_path / "gram.state")
    for one in (gram, loaded):
        one.update(x[30:], drift=drift[30:])
    assert torch.equal(loaded.matrix(), gram.matrix())
    assert torch.equal(loaded.sum, gram.sum)
    for name, tensor in gram.drift.parts().items():
        assert torch.equal(getattr(loaded.drift, name), tensor)
    assert (loaded.tokens, loaded.name) == (40, gram.name)


def test_saved_sums_have_the_tokens_that_wait(tmp_path):
    x, gram = torch.randint(-9, 9, (7, H)).float(), grail.Gram(H, buffer=BUFFER)
    gram.update(x)
    assert torch.equal(saved_and_loaded(gram, tmp_path / "gram.state").matrix(), x.T @ x)


def test_a_gram_that_saw_nothing_can_be_saved(tmp_path):
    assert saved_and_loaded(grail.Gram(H), tmp_path / "gram.state").tokens == 0


def test_a_file_of_other_sums_is_refused(tmp_path):
    path = tmp_path / "gram.state"
    grail.Gram(H, device="cpu").save(path)
    content, tensors = vars(state.read(path, "gram")).values()
    state.write(path, "gram", content, {**tensors, "sum": tensors["sum"][:-1]})
    with pytest.raises(StateError, match=r"gram\.state"):
        grail.Gram.load(path)


@pytest.mark.parametrize(
    ("per", "scale", "number"),
    [("sum", 2, 1), ("sample", 2, 3 + 1), ("sample", 1, 4), ("token", 2, 3 * 5 + 7)],
)
def test_a_hessian_has_the_convention_of_another_library(per, scale, number):
    gram = grail.Gram(4)
    batches = [torch.randn(3, 5, 4), torch.randn(7, 4)]  # three samples, and one without an axis
    for x in batches:
        gram.update(x)
    tokens = torch.cat([x.reshape(-1, 4) for x in batches]).double()
    expected = scale * tokens.T @ tokens / number
    assert (gram.samples, gram.tokens) == (4, 22)
    found = gram.hessian(per, scale=scale).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    out = torch.full((4, 4), torch.nan, dtype=torch.float64)
    assert gram.hessian(per, scale=scale, out=out) is out
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_samples_are_counted_as_told_merged_and_saved(tmp_path):
    one, two = grail.Gram(4), grail.Gram(4)
    one.update(torch.randn(6, 4), samples=2)
    two.update(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    two.update(torch.randn(0, 4))
    assert (one.samples, two.samples) == (2, 2)
    one.merge(two)
    one.save(tmp_path / "gram")
    assert grail.Gram.load(tmp_path / "gram").samples == 4
    with pytest.raises(InputError, match="samples must be"):
        one.update(torch.randn(6, 4), samples=-1)


def test_a_hessian_without_tokens_is_zeros_where_asked():
    gram = grail.Gram(3)
    with pytest.raises(EmptyCalibrationError):
        gram.hessian(per="token")
    assert torch.equal(gram.hessian(per="token", empty="zeros"), torch.zeros(3, 3))
    out = torch.ones(3, 3)
    assert torch.equal(gram.hessian(out=out, empty="zeros"), torch.zeros(3, 3))
    gram.update(torch.ones(2, 3), samples=0)
    with pytest.raises(InputError, match="2 tokens of 0 samples"):
        gram.hessian(per="sample")
    for wrong in ({"per": "batch"}, {"empty": "nan"}):
        with pytest.raises(InputError, match="must be"):
            gram.hessian(**wrong)


def test_a_gram_of_a_layer_counts_what_its_weight_reads():
    layer = nn.Conv2d(4, 6, 3, groups=2)
    gram = grail.Gram.of(layer, name="conv")
    assert gram.channels == 2 * 9
    gram.update_from(layer, (torch.randn(3, 4, 5, 6),))
    gram.update_from(layer, torch.randn(4, 5, 6))  # one sample without its axis
    assert (gram.samples, gram.tokens) == (4, 4 * 3 * 4 * 2)
    with pytest.raises(InputError, match=r"conv.*18 channels"):
        gram.update_from(nn.Linear(4, 2), torch.randn(3, 4))
    with pytest.raises(InputError, match="has positions"):
        gram.update_from(layer, torch.randn(3, 4, 5, 6), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ModelError, match="a BatchNorm2d has no weight"):
        grail.Gram.of(nn.BatchNorm2d(4))
