"""The driver against a brute-force reference, and what it promises about the model it was given."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import grail
from grail.algebra.width import HeadWidth
from grail.calibrate.stream import Stream
from grail.errors import EmptyCalibrationError, InputError, ModelError, NonFiniteError
from grail.networks import find
from grail.recipe import Recipe
from grail.statistics.site_statistics import SiteStatistics
from tests.conftest import FAMILIES
from tests.counting import injected
from tests.hooks import hooks_of

ALPHA = 1e-2


def seen_by(
    model: nn.Module, module: nn.Module, batches: list[torch.Tensor], output: bool = False
) -> np.ndarray:
    """What `module` reads, or returns, in plain forward passes of `model`, [tokens, _] in fp64."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        seen.append((result if output else args[0]).flatten(0, -2))

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen).double().numpy()


def rebuilt(weight: np.ndarray, x: np.ndarray, kept: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """(W G + β C) Rᵀ (A + λI)⁻¹ in fp64 for the drift βδ; the paper's formula where it is 0."""
    g = x.T @ x
    a = g[np.ix_(kept, kept)]
    target = weight @ g[:, kept] + drift.T @ x[:, kept]
    return target @ np.linalg.inv(a + ALPHA * np.diag(a).mean() * np.eye(len(kept)))


def read_as_dense(layers, dense, seen, correction):
    """W M for layers that read x̃, where their dense form reads x: M guesses x from x̃."""
    x, x_dense = seen(layers[0]), seen(dense)
    g = x.T @ x
    ridge = g + ALPHA * np.diag(g).mean() * np.eye(len(g))
    guess = np.eye(len(g)) + correction * (x_dense - x).T @ x @ np.linalg.inv(ridge)
    for layer in layers:
        weight = layer.weight.detach().double().numpy() @ guess
        layer.weight = nn.Parameter(torch.from_numpy(weight).float())


def brute_force(model, batches, keep, closed_loop, correction, weighted, inputs):
    """Compresses `model` with whole-model forward passes; magnitude selection by hand."""
    frozen = copy.deepcopy(model)
    for number, layer in enumerate(model.model.layers):
        dense = frozen.model.layers[number]
        source, origin = (model, layer) if closed_loop else (frozen, dense)

        def weighed(
            x: np.ndarray, name: str, layer: nn.Module = layer, dense: nn.Module = dense
        ) -> tuple[np.ndarray, np.ndarray]:
            after = {"output": not name}
            there = seen_by(frozen, dense.get_submodule(name), batches, **after)
            here = seen_by(model, layer.get_submodule(name), batches, **after)
            relative = correction and (weighted is True or (weighted and list(keep) == ["heads"]))
            norms = np.sqrt((there**2).mean(1, keepdims=True) + 1e-6) if relative else 1
            return x / norms, correction * (there - here) / norms

        def read(module: nn.Module, dense: nn.Module = dense) -> np.ndarray:
            whole = frozen if module in dense.modules() else model
            return seen_by(whole, module, batches)

        attention = layer.self_attn
        if inputs:
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            read_as_dense(projections, dense.self_attn.q_proj, read, correction)
        # Before the first block there is no drift, and what keeps its width stays as it is.
        if keep.get("heads", 1) < 1 or (correction and "heads" in keep and number):
            x = seen_by(source, origin.self_attn.o_proj, batches)
            _drop_heads(layer, *weighed(x, "post_attention_layernorm"), keep["heads"])
        if "mlp" in keep:
            x = seen_by(source, origin.mlp.down_proj, batches)
            _drop_channels(layer.mlp, *weighed(x, ""), keep["mlp"])
    return model


def _drop_channels(mlp: nn.Module, x: np.ndarray, drift: np.ndarray, keep: float) -> None:
    squares = sum(p.weight.double().square().sum(1) for p in (mlp.gate_proj, mlp.up_proj))
    kept = np.sort(np.argsort(-squares.detach().numpy())[: round(keep * x.shape[1])])
    down = rebuilt(mlp.down_proj.weight.detach().double().numpy(), x, kept, drift)
    for producer in (mlp.gate_proj, mlp.up_proj):
        producer.weight = nn.Parameter(producer.weight.detach()[kept])
    mlp.down_proj.weight = nn.Parameter(torch.from_numpy(down).float())


def _drop_heads(layer: nn.Module, x: np.ndarray, drift: np.ndarray, keep: float) -> None:
    """Whole groups of two query heads of 8, scored by the norms of their rows."""
    attention = layer.self_attn
    q, k, v = (getattr(attention, n).weight.detach() for n in ("q_proj", "k_proj", "v_proj"))
    shared = sum(w.double().view(3, 8, -1).square().sum(2) for w in (k, v))
    # Each query channel's score is a norm (not a square), summed over the head: repeat that per
    # channel.
    per_channel = (q.double().view(3, 2, 8, -1).square().sum(3) + shared[:, None]).sqrt()
    groups = np.sort(np.argsort(-per_channel.sum((1, 2)).numpy())[: round(keep * 3)])
    rows = np.concatenate([np.arange(16 * g, 16 * g + 16) for g in groups])
    shared_rows = np.concatenate([np.arange(8 * g, 8 * g + 8) for g in groups])
    out = rebuilt(attention.o_proj.weight.detach().double().numpy(), x, rows, drift)
    attention.q_proj.weight = nn.Parameter(q[rows])
    attention.k_proj.weight = nn.Parameter(k[shared_rows])
    attention.v_proj.weight = nn.Parameter(v[shared_rows])
    attention.o_proj.weight = nn.Parameter(torch.from_numpy(out).float())


@pytest.mark.parametrize(
    ("closed_loop", "correction", "weighted", "inputs"),
    [
        (True, 0.0, False, False),
        (True, 0.7, False, False),
        (True, 0.7, False, True),
        (True, 0.7, True, True),
        (True, 0.7, "auto", False),
        (False, 0.0, "auto", False),
    ],
    ids=["closed", "drift", "attention", "attention, weighted", "auto", "open"],
)
@pytest.mark.parametrize(
    "keep",
    [{"mlp": 0.7}, {"heads": 2 / 3}, {"mlp": 0.7, "heads": 2 / 3}, {"mlp": 0.7, "heads": 1.0}],
    ids=["mlp", "heads", "mlp+heads", "mlp+full heads"],
)
def test_a_run_equals_brute_force_over_whole_forward_passes(
    keep, closed_loop, correction, weighted, inputs, tiny_llama, tiny_batches
):
    model, batches = tiny_llama(num_hidden_layers=3), tiny_batches(count=8, length=24)
    asked = keep, closed_loop, correction, weighted, inputs
    reference = brute_force(copy.deepcopy(model), batches, *asked)
    report = grail.compress(
        model,
        batches,
        keep=keep,
        sites=tuple(keep),
        selector="magnitude",
        alpha=ALPHA,
        toward="zero",
        drift_correction=correction,
        correct_attention=inputs,
        token_weights=weighted,
        closed_loop=closed_loop,
        multiple=1,
        progress=False,
    )
    assert [row.block for row in report.inputs] == [1, 2] * inputs  # before the first is no drift
    with torch.no_grad():
        ours, theirs = (m(batches[0]).logits for m in (model, reference))
    # fp32 forward passes and Grams (1e-6) through a ridge system of condition ≤ 1/α.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


class Adapted(nn.Linear):
    """Not a plain layer: what it computes is not its weight's alone."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.mean(-1, keepdim=True)


def runs_twice(attention: nn.Module) -> None:
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (
        forward(*args, **kwargs),
        forward(*args, **kwargs),
    )[0]


def is_adapted(attention: nn.Module) -> None:
    attention.q_proj.__class__ = Adapted


@pytest.mark.parametrize("change", [runs_twice, is_adapted])
def test_attention_that_is_not_plain_is_left_alone(change, tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=8, length=24)
    for layer in model.model.layers[1:]:  # the first never reads a drifted stream
        change(layer.self_attn)
    expected = copy.deepcopy(model)
    for network, corrects in ((expected, False), (model, True)):
        settings = {"sites": ("mlp",), "correct_attention": corrects}
        report = grail.compress(network, batches, 0.5, progress=False, **settings)
        assert report.inputs == []
    said = [note for note in report.notes if "self_attn was not corrected: " in note]
    assert len(said) == (change is runs_twice)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "settings",
    [
        {"drift_correction": 0},
        {"closed_loop": False},
        {"fit_bias": True},
        {"compensate": False},
    ],
    ids=str,
)
def test_token_weights_are_refused_where_no_drift_is_followed_or_a_bias_is_fitted(
    settings, tiny_llama, tiny_batches
):
    kinds = ("heads",)  # the default asks for it where there is drift to follow
    grail.compress(tiny_llama(), tiny_batches(), 0.5, kinds, progress=False, **settings)
    with pytest.raises(InputError, match="token_weights needs the dense network's stream"):
        grail.compress(tiny_llama(), tiny_batches(), token_weights=True, **settings)


@pytest.mark.parametrize(
    "settings", [{"drift_correction": 0}, {"closed_loop": False}, {"compensate": False}], ids=str
)
def test_attention_cannot_be_corrected_where_no_drift_is_followed(
    settings, tiny_llama, tiny_batches
):
    with pytest.raises(InputError, match="correct_attention needs the dense network's stream"):
        grail.compress(tiny_llama(), tiny_batches(), correct_attention=True, **settings)


def test_weighted_fp16_tokens_do_not_overflow(tiny_llama, tiny_batches):
    model = tiny_llama(num_hidden_layers=1)
    stream = Stream(model, find(model).blocks, tiny_batches(count=1))
    ((site,),) = find(model).sites(("mlp",))
    statistics = SiteStatistics(
        site, site.consumers[0], stream, Recipe(alpha=1e-3, drift_correction=0)
    )
    x = torch.randn(*stream.hidden[0].shape[:-1], site.channels)
    drift, scale = torch.randn_like(stream.hidden[0]), torch.full(x.shape[:-1], 1e3)
    x = (100 * x).half()  # times the scale it is beyond fp16
    statistics.update(0, x, drift, scale=scale)
    tokens = x.double().flatten(0, -2) * 1e3
    expected = tokens.T @ tokens
    bound = 16 * torch.finfo(torch.float32).eps * (tokens.abs().T @ tokens.abs())
    assert ((statistics.train.matrix().double() - expected).abs() <= bound).all()
    assert statistics.train.drift.energy == pytest.approx(
        1e6 * drift.double().square().sum().item()
    )


@pytest.mark.parametrize("kinds", [("mlp",), ("heads",), ("mlp", "heads")], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reloads_to_the_same_logits(family, kinds, tiny_model, tiny_batches, tmp_path):
    from transformers import AutoModelForCausalLM

    extra = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = tiny_model(family, tie_word_embeddings=True, **extra)
    dense, batches = sum(p.numel() for p in model.parameters()), tiny_batches()
    report = grail.compress(model, batches, keep=0.5, sites=kinds, progress=False)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(batches[0]).logits, model(batches[0]).logits)
    assert report.model["parameters"] == {
        "before": dense,
        "after": sum(p.numel() for p in reloaded.parameters()),
    }
    assert report.model["parameters"]["after"] < dense


@pytest.mark.parametrize("sites", [("mlp",), ("heads",), ("mlp", "heads")], ids="+".join)
def test_compensation_lowers_the_error_of_the_logits(sites, tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=20, length=32)
    held_out = tiny_batches(count=1, length=32, seed=1)[0]
    with torch.no_grad():
        dense = model(held_out).logits
        errors = {}
        for compensate in (False, True):
            narrow = copy.deepcopy(model)
            report = grail.compress(
                narrow, batches, keep=0.7, sites=sites, compensate=compensate, progress=False
            )
            errors[compensate] = (narrow(held_out).logits - dense).norm()
            for row in report.sites:
                assert (
                    (row.error < row.baseline_error)
                    if compensate
                    else row.error == row.baseline_error
                )
    assert errors[True] < errors[False]


def test_heads_and_channels_that_say_nothing_can_go_without_a_trace(tiny_llama, tiny_batches):
    # Group 1's heads and odd MLP channels are cut off at their consumers: a right wiring drops
    # exactly those.
    model, batches = tiny_llama(), tiny_batches()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 16:32] = 0
            layer.mlp.down_proj.weight[:, 1::2] = 0
        dense = model(batches[0]).logits
    grail.compress(
        model,
        batches,
        keep={"mlp": 0.5, "heads": 2 / 3},
        sites=("mlp", "heads"),
        selector="wanda",
        compensate=False,
        multiple=1,
        progress=False,
    )
    assert model.config.num_key_value_heads == 2
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, dense, rtol=1e-4, atol=1e-4)


def test_query_heads_alone_can_be_narrowed_in_every_group(tiny_llama, tiny_batches):
    # keep = 0.5 of 6 heads in 3 groups of 2: three heads, as 3 groups of 1 or 1 group of… 3 does
    # not exist.
    model, batches = tiny_llama(hidden_size=48), tiny_batches()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.view(48, 3, 2, 8)[:, :, 0] = 0
        dense = model(batches[0]).logits
    grail.compress(model, batches, keep=0.5, sites=("heads",), compensate=False, progress=False)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (3, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, dense, rtol=1e-4, atol=1e-4)


def kept_in(views: list[grail.select.View]) -> grail.select.Selector:
    """A selector that keeps what it sees, and the loudest channels."""

    def select(view: grail.select.View) -> grail.Reduction:
        views.append(view)
        return view.width.best(view.gram.energy)

    return select


def test_one_sequence_leaves_nothing_to_hold_out_and_the_report_says_so(tiny_llama, tiny_batches):
    batches = tiny_batches(count=1, rows=1, length=200)
    views = []
    settings = {"selector": kept_in(views), "progress": False}
    report = grail.compress(tiny_llama(), batches, keep=0.5, **settings)
    assert {view.drift_correction for view in views} == {0.0}
    assert any("nothing could be held out" in note for note in report.notes)
    assert {(row.alpha, row.drift_correction) for row in report.sites} == {(1e-3, 0.0)}


def test_held_out_sequences_choose_for_every_site(tiny_llama, tiny_batches):
    model = tiny_llama(num_hidden_layers=3)
    report = grail.compress(model, tiny_batches(count=20, length=32), keep=0.5, progress=False)
    assert not any("held out" in note for note in report.notes)
    assert report.sites[0].drift_correction == 0  # nothing drifts before the first block
    assert all(0 < row.drift_correction <= 1 for row in report.sites[1:])
    assert all(row.tokens == 20 * 2 * 32 for row in report.sites)


@pytest.mark.parametrize("correction", ["auto", 0.3, 0.0])
def test_a_selector_sees_what_drift_it_is_to_reckon_with(tiny_llama, tiny_batches, correction):
    seen = []
    model, batches = tiny_llama(num_hidden_layers=4), tiny_batches(count=20, length=32)
    settings = {"selector": kept_in(seen), "drift_correction": correction, "progress": False}
    report = grail.compress(model, batches, keep=0.5, **settings)
    taken = [row.drift_correction for row in report.sites]
    expected = [0, *taken[:-1]] if correction == "auto" else [correction] * 4
    assert [view.drift_correction for view in seen] == expected
    assert seen[0].drifted is None  # nothing drifts before the first block
    assert [view.drifted is not None for view in seen[1:]] == [share > 0 for share in expected[1:]]
    assert all(view.drifted.any() for view in seen[1:] if view.drift_correction)


@pytest.mark.parametrize("heads", [1.0, 0.5])
def test_no_choice_reckons_with_drift_where_sites_of_several_kinds_are_narrowed(
    tiny_llama, tiny_batches, heads
):
    views = []
    model, batches = tiny_llama(num_hidden_layers=4), tiny_batches(count=20, length=32)
    keep = {"mlp": [0.5, 1.0, 0.5, 0.5], "heads": heads}  # what is not narrowed says nothing
    settings = {"sites": ("mlp", "heads"), "selector": kept_in(views), "progress": False}
    report = grail.compress(model, batches, keep, **settings)
    seen = [view.drift_correction for view in views if not isinstance(view.width, HeadWidth)]
    taken = [row.drift_correction for row in report.sites if row.kind == "mlp"]
    assert taken[2] > 0
    assert seen == ([0, taken[0], taken[2]] if heads == 1 else [0, 0, 0])


def test_folding_runs_through_the_same_door(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches()
    with torch.no_grad():  # every channel twice: folding by halves loses nothing
        for mlp in (layer.mlp for layer in model.model.layers):
            for producer in (mlp.gate_proj, mlp.up_proj):
                producer.weight[40:] = producer.weight[:40]
        dense = model(batches[0]).logits
    report = grail.compress(
        model, batches, keep=0.5, selector="folding", compensate=False, progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, dense, rtol=1e-4, atol=1e-4)
    # Of a folding that nothing is fitted to the error is not known.
    assert [row.error for row in report.sites] == [None, None]
    assert sum("its error is not measured: a folding" in note for note in report.notes) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_stays_16_bit(dtype, tiny_llama, tiny_batches):
    model = tiny_llama().to(dtype)
    report = grail.compress(
        model,
        tiny_batches(count=8),
        keep=0.5,
        sites=("mlp", "heads"),
        alpha=ALPHA,
        progress=False,
    )
    assert {p.dtype for p in model.parameters()} == {dtype}
    # Rounding W' to 8 bits costs far less than dropping half of the channels does.
    assert all(row.error < row.baseline_error for row in report.sites)


def test_batches_of_several_lengths_are_one_calibration_set(tiny_llama, tiny_batches):
    mixed = tiny_batches(count=2, length=16) + tiny_batches(count=2, rows=3, length=9)
    alone = [row[None] for batch in mixed for row in batch]  # the same sequences, one by one
    logits = []
    for batches in (mixed, alone):
        model = tiny_llama()
        report = grail.compress(model, batches, keep=0.5, sites=("mlp", "heads"), progress=False)
        assert report.calibration == {
            "tokens": 2 * 2 * 16 + 2 * 3 * 9,
            "sequences": 10,
            "sequence_length": 16,
        }
        with torch.no_grad():
            logits.append(model(mixed[0]).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_padding_counts_for_nothing(tiny_llama, tiny_batches):
    batches = tiny_batches(count=4)
    padded = [
        {
            "input_ids": nn.functional.pad(batch, (0, 5), value=2),
            "attention_mask": nn.functional.pad(torch.ones_like(batch), (0, 5)),
        }
        for batch in batches
    ]
    narrow = []
    for calibration in (batches, padded):
        model = tiny_llama()
        report = grail.compress(
            model, calibration, keep=0.5, sites=("mlp", "heads"), progress=False
        )
        assert report.calibration["tokens"] == 4 * 32
        narrow.append(model)
    with torch.no_grad():
        plain, with_padding = (model(batches[0]).logits for model in narrow)
    torch.testing.assert_close(plain, with_padding, rtol=1e-3, atol=1e-3)


def fingerprint(model: nn.Module) -> tuple:
    """Everything a failed run must leave: tensors, configuration, hooks, flags."""
    return (
        {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()},
        model.config.to_dict(),
        [(m.training, hooks_of(m)) for m in model.modules()],
        [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)],
        [m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")],
        [m for m in model.modules() if "forward" in m.__dict__],
    )


def assert_untouched(model: nn.Module, before: tuple) -> None:
    after = fingerprint(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    for name, (identity, value) in before[0].items():
        assert after[0][name][0] == identity
        assert torch.equal(after[0][name][1], value) or not value.isfinite().all()


def assert_interrupted_and_untouched(model, batches, error, last, **settings):
    """A run whose selector raises `error` when it is called for the `last` time changes nothing."""
    before = fingerprint(model)
    calls = 0

    def fails(view):
        nonlocal calls
        calls += 1
        if calls == last:
            injected("interrupted runs")
            raise error
        return view.width.best(view.gram.energy)

    with pytest.raises(error):
        grail.compress(model, batches, keep=0.5, selector=fails, progress=False, **settings)
    assert calls == last
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_the_model_as_it_was(error, tiny_llama, tiny_batches):
    assert_interrupted_and_untouched(
        tiny_llama().train(),
        tiny_batches(),
        error,
        last=3,  # in the second block
        sites=("mlp", "heads"),
    )


def test_activations_that_overflow_are_refused_with_their_site(tiny_llama, tiny_batches):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = 3e38
    before = fingerprint(model)
    with pytest.raises(NonFiniteError, match=r"activations of model\.layers\.1\.mlp") as caught:
        grail.compress(model, tiny_batches(), keep=0.5, progress=False)
    assert caught.value.channels == (7,)
    assert_untouched(model, before)


@pytest.mark.parametrize("settings", [{}, {"closed_loop": False}, {"drift_correction": 0.0}])
def test_tokens_with_nan_are_dropped_on_request_as_if_masked(settings, tiny_llama, tiny_batches):
    batches = tiny_batches()
    poison = 96  # in the last sequence, all of which it spoils: 0·NaN is NaN in attention
    for batch in batches:
        batch[batch == poison] = 0
    masks = [torch.ones_like(batch) for batch in batches]
    batches[-1][-1, 5], masks[-1][-1] = poison, 0
    masked = [{"input_ids": b, "attention_mask": m} for b, m in zip(batches, masks, strict=True)]
    clean, poisoned = tiny_llama(), tiny_llama()
    with torch.no_grad():
        poisoned.model.embed_tokens.weight[poison, 3] = float("nan")
    common = {"keep": 0.5, "sites": ("mlp", "heads"), "progress": False, **settings}
    expected = grail.compress(clean, masked, **common)
    report = grail.compress(poisoned, batches, **common, non_finite="drop")
    notes = [note for note in report.notes if "16 tokens with NaN or Inf were dropped" in note]
    assert len(notes) == len(report.sites) == 4
    assert [row.tokens for row in report.sites] == [row.tokens for row in expected.sites]
    for name, weight in clean.model.layers.named_parameters():
        found = poisoned.model.layers.get_parameter(name)
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp.up_proj", "mlp.down_proj", "self_attn.k_proj"])
def test_non_finite_weights_are_refused_with_their_layer(name, tiny_llama, tiny_batches):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].get_submodule(name).weight[3, 0] = float("nan")
    before = fingerprint(model)
    layer, linear = name.split(".")
    with pytest.raises(NonFiniteError, match=rf"model\.layers\.1\.{layer}\.{linear}"):
        grail.compress(model, tiny_batches(), keep=0.5, sites=("mlp", "heads"), progress=False)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep": 0.0}, InputError, r"\(0, 1\]"),
        ({"dense_share": 0.0}, InputError, r"dense_share must be a share in \(0, 1\]; got 0"),
        ({"dense_share": "half"}, InputError, "dense_share must be a share"),
        ({"dense_share": 0.5, "drift_correction": 0}, InputError, "is followed where drift is"),
        ({"non_finite": "ignore"}, InputError, "refuse, drop; got 'ignore'"),
        ({"non_finite": "drop", "repair": True}, InputError, "repair counts every pixel"),
        ({"keep": 1.5}, InputError, r"\(0, 1\]"),
        ({"keep": 0.01}, InputError, "width of 0"),
        ({"keep": {"heads": 0.5}}, InputError, "not the site kind 'mlp'"),
        ({"sites": ("embeddings",)}, InputError, "heads, mlp"),
        ({"sites": ()}, InputError, "heads, mlp"),
        ({"selector": "magic"}, InputError, "unknown selector"),
        ({"alpha": -1.0}, InputError, "alpha"),
        ({"toward": "up"}, InputError, "toward"),
        ({"multiple": 0}, InputError, "multiple"),
        ({"batches": []}, EmptyCalibrationError, "no token"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(
    settings, error, message, tiny_llama, tiny_batches
):
    model = tiny_llama()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        grail.compress(model, **{"batches": tiny_batches(), "progress": False, **settings})
    assert_untouched(model, before)


def test_a_selector_that_keeps_another_number_is_refused(tiny_llama, tiny_batches):
    def too_few(view):
        return grail.Selection([0, 1], view.width.channels)

    with pytest.raises(InputError, match=r"Selection\(2 of 80 channels\) at model\.layers\.0\.mlp"):
        grail.compress(tiny_llama(), tiny_batches(), keep=0.5, selector=too_few, progress=False)


def test_a_model_of_no_known_family_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match=r"Linear; grail\.networks\.supported\(\) lists"):
        grail.compress(nn.Linear(2, 2), [torch.ones(1, 2, dtype=torch.int64)])


class QuantisedLinear(nn.Linear):
    """Rounds its weight whenever it runs."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


def test_a_quantised_layer_is_refused(tiny_llama, tiny_batches):
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = QuantisedLinear(48, 80, bias=False)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj is a QuantisedLinear"):
        grail.compress(model, tiny_batches(), keep=0.5, progress=False)


def test_quantised_layers_of_sites_that_are_not_narrowed_do_no_harm(tiny_llama, tiny_batches):
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.o_proj = QuantisedLinear(*attention.o_proj.weight.shape[::-1], bias=False)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj is a QuantisedLinear"):
        grail.compress(model, tiny_batches(), keep=0.5, sites=("heads",), progress=False)
    grail.compress(model, tiny_batches(), keep=0.5, sites=("mlp",), progress=False)
    assert model.config.intermediate_size == model.model.layers[0].mlp.up_proj.out_features == 40


def test_keeping_everything_changes_no_bit(tiny_llama, tiny_batches):
    model = tiny_llama()
    before = fingerprint(model)
    report = grail.compress(model, tiny_batches(), keep=1.0, sites=("mlp", "heads"), progress=False)
    assert_untouched(model, before)
    assert [(row.channels, row.kept, row.error) for row in report.sites] == [
        (48, 48, 0),
        (80, 80, 0),
    ] * 2


def test_surroundings_are_left_as_found(tiny_llama, tiny_batches):
    model, batches = tiny_llama().train(), tiny_batches()
    copies = [batch.clone() for batch in batches]
    state = torch.random.get_rng_state()
    grail.compress(model, batches, keep=0.5, selector="random", progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, batches, copies))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    model(batches[0]).logits.sum().backward()  # the new weights train as the old ones did
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None


def test_a_run_is_repeatable_bit_for_bit(tiny_llama, tiny_batches):
    runs = []
    for _ in range(2):
        model = tiny_llama()
        grail.compress(model, tiny_batches(), keep=0.5, selector="folding", progress=False)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_report_survives_json_and_says_what_was_rounded(tiny_llama, tiny_batches):
    report = grail.compress(
        tiny_llama(), tiny_batches(), keep=0.9, sites=("mlp", "heads"), progress=False
    )
    assert grail.Report.from_json(report.to_json()) == report
    assert report.settings["keep"] == 0.9
    assert any(note.startswith("heads: keep=0.9") for note in report.notes)
    assert report.model["widths"] == {
        "before": {"heads": 48, "mlp": 80},
        "after": {"heads": 48, "mlp": 72},
    }
    phases = {"forward", "gram", "select", "solve", "absorb", "other"}
    assert phases < report.seconds.keys()
    assert report.seconds["total"] == pytest.approx(sum(report.seconds[p] for p in phases))


def test_each_block_keeps_its_own_share(tiny_llama, tiny_batches):
    model = tiny_llama()
    report = grail.compress(model, tiny_batches(), {"mlp": [0.5, 0.9]}, ("mlp",), progress=False)
    assert [row.kept for row in report.sites] == [40, 72]
    assert report.model["widths"]["after"] == {
        "model.layers.0.mlp": 40,
        "model.layers.1.mlp": 72,
    }
    with pytest.raises(InputError, match=r"keep gives 1 shares for mlp.*layers\.1\.mlp"):
        grail.compress(tiny_llama(), tiny_batches(), {"mlp": [0.5]}, ("mlp",), progress=False)


def test_a_layer_that_was_forgotten_between_a_site_s_layers_is_found():
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    network = nn.Sequential(*layers).eval()
    images = [torch.randn(2, 1, 9, 9) for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    site = grail.Site(producers=["0"], consumers=["3"])
    with pytest.raises(ModelError, match=r"does not run once it is narrow: .*along=\[…\]"):
        grail.compress(network, images, 0.5, sites=[site], progress=False)
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())
    site = grail.Site(producers=["0"], along=["1"], consumers=["3"])
    grail.compress(network, images, 0.5, sites=[site], progress=False)
    assert network(images[0]).shape == (2, 4, 5, 5)


def test_compensation_is_on_or_off(tiny_llama, tiny_batches):
    with pytest.raises(InputError, match="compensate must be True or False; got str"):
        grail.compress(tiny_llama(), tiny_batches(), compensate="all")


def test_exact_folding_is_least_squares_on_what_the_folded_producers_write(
    tiny_llama, tiny_batches
):
    model, batches = tiny_llama(num_hidden_layers=1), tiny_batches(count=8, length=24)
    dense = copy.deepcopy(model)
    settings = {"selector": "folding", "alpha": ALPHA, "drift_correction": 0.0, "keep": 0.5}
    report = grail.compress(model, batches, **settings, progress=False)
    paper = copy.deepcopy(dense)
    grail.compress(paper, batches, **settings, exact_folding=False, progress=False)
    narrow, wide = model.model.layers[0].mlp, dense.model.layers[0].mlp
    x, h = seen_by(dense, wide.down_proj, batches), seen_by(model, narrow.down_proj, batches)
    target = x @ wide.down_proj.weight.detach().double().numpy().T
    folded = paper.model.layers[0].mlp
    assert torch.equal(folded.up_proj.weight, narrow.up_proj.weight)
    # Toward the plainly folded consumer W₀: W' = W₀ + (Y hᵀ − W₀ A)(A + λI)⁻¹.
    found = narrow.down_proj.weight.detach().double().numpy()
    a = h.T @ h
    ridge = ALPHA * np.diag(a).mean()
    # (W' − W₀)(A + λI) = Y hᵀ − W₀ A, so W'(A + λI) − Y hᵀ = λ W₀: its columns add up members'.
    plain = (found @ (a + ridge * np.eye(len(a))) - target.T @ h) / ridge
    dense_down = wide.down_proj.weight.detach().double().numpy()
    np.testing.assert_allclose(plain.sum(1), dense_down.sum(1), rtol=0.02, atol=0.02)
    exact = np.linalg.norm(h @ found.T - target) / np.linalg.norm(target)
    inexact = h @ folded.down_proj.weight.detach().double().numpy().T - target
    assert report.sites[0].error == pytest.approx(exact, rel=1e-3)
    assert exact < np.linalg.norm(inexact) / np.linalg.norm(target)


def test_exact_folding_undoes_its_share_of_the_drift_and_all_that_folding_took(
    tiny_llama, tiny_batches
):
    def folded(correction, batches):
        model = tiny_llama(num_hidden_layers=2)
        settings = {"selector": "folding", "alpha": ALPHA, "drift_correction": correction}
        report = grail.compress(model, batches, 0.5, ("mlp",), progress=False, **settings)
        return [layer.mlp.down_proj.weight.detach() for layer in model.model.layers], report.sites

    batches = tiny_batches(count=8, length=24)
    (none, rows), (half, halves), (full, _) = (folded(share, batches) for share in (0.0, 0.5, 1.0))
    # Nothing has drifted before the first block; behind it the fit is linear in its aim.
    torch.testing.assert_close(none[0], half[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(half[1], (none[1] + full[1]) / 2, rtol=0, atol=1e-5)
    assert not torch.allclose(none[1], full[1], atol=1e-3)
    assert [row.drift_correction for row in (*rows, *halves)] == [0, 0, 0.5, 0.5]
    # Where nothing can be held out drift is left, and folding is compensated all the same.
    alone, rows = folded("auto", [batches[0][:1]])
    assert [row.drift_correction for row in rows] == [0, 0]
    assert all(row.error < 0.9 * row.baseline_error for row in rows)
    for weight, same in zip(alone, folded(0.0, [batches[0][:1]])[0], strict=True):
        torch.testing.assert_close(weight, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kinds", [("mlp",), ("mlp", "heads")], ids="+".join)
def test_llama_is_given_the_biases_that_compensation_wants(
    kinds, tiny_llama, tiny_batches, tmp_path
):
    from transformers import AutoModelForCausalLM

    model, batches = tiny_llama(), tiny_batches(count=10)
    report = grail.compress(model, batches, 0.5, kinds, fit_bias=True, progress=False)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(batches[0]).logits, model(batches[0]).logits)
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() > 0
    assert all(row.error < row.baseline_error for row in report.sites)


def test_biases_that_were_added_go_with_a_run_that_fails(tiny_llama, tiny_batches):
    model = tiny_llama()
    before = fingerprint(model)

    def fails(view):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        grail.compress(model, tiny_batches(), fit_bias=True, selector=fails, progress=False)
    assert_untouched(model, before)
