"""Experts: what each reads is seen in the library's own forward, and all are narrowed together."""

import copy
import functools
import itertools
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import grail
from grail.algebra.expert_grams import RaggedGrams
from grail.errors import InputError
from grail.networks import find
from grail.networks.layers import Routed
from grail.report.report import SiteReport
from grail.run.solver import last_share
from grail.statistics import collector as passes
from tests.conftest import MIXTURES

ALPHA = 1e-2


def padded(batches):
    """The same as mappings, the last row of each with seven tokens."""
    masks = [torch.ones_like(tokens) for tokens in batches]
    for mask in masks:
        mask[-1, 7:] = 0
    pairs = zip(batches, masks, strict=True)
    return [{"input_ids": tokens, "attention_mask": mask} for tokens, mask in pairs]


@torch.no_grad()
def read_by_each_expert(model, layer, batches):
    """What the second matrix of every expert reads of tokens that count, [N, H] in fp64 each."""
    experts, seen = layer.mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    for batch in batches:
        model(**batch)
    handle.remove()
    rows = []
    for number in range(experts.num_experts):
        gate, up = experts.gate_up_proj[number].double().chunk(2)
        of_expert = []
        for (hidden, chosen), batch in zip(seen, batches, strict=True):
            here = (chosen == number).any(1) & batch["attention_mask"].flatten().bool()
            x = hidden[here].double()
            of_expert.append(nn.functional.silu(x @ gate.T) * (x @ up.T))
        rows.append(torch.cat(of_expert))
    return rows


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("closed_loop", [True, False], ids=["closed", "open"])
def test_every_expert_is_fitted_to_what_it_reads(family, closed_loop, tiny_model, tiny_batches):
    model = tiny_model(family)
    batches = padded(tiny_batches(count=12, length=24))
    reference, dense = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"selector": "magnitude", "alpha": ALPHA, "toward": "zero", "multiple": 1}
    settings |= {"drift_correction": 0, "closed_loop": closed_loop, "progress": False}
    report = grail.compress(model, batches, keep=0.5, **settings)
    tokens = []
    for block, layer in enumerate(reference.model.layers):
        frozen = dense.model.layers[block]
        source = (reference, layer) if closed_loop else (dense, frozen)
        inputs = read_by_each_expert(*source, batches)
        tokens += map(len, inputs)
        gates, downs = [], []
        for number, x in enumerate(inputs):
            gate_up = frozen.mlp.experts.gate_up_proj[number].detach()
            down = frozen.mlp.experts.down_proj[number].detach().double()
            scores = gate_up.double().view(2, -1, 48).square().sum((0, 2))
            kept = scores.topk(40).indices.sort().values
            gram = x.T @ x
            inner = gram[kept][:, kept]
            ridge = ALPHA * inner.diagonal().mean() * torch.eye(40)
            downs.append((down @ gram[:, kept] @ torch.linalg.inv(inner + ridge)).float())
            gates.append(gate_up.view(2, -1, 48)[:, kept].flatten(0, 1))
        layer.mlp.experts.gate_up_proj = nn.Parameter(torch.stack(gates))
        layer.mlp.experts.down_proj = nn.Parameter(torch.stack(downs))
    assert [row.tokens for row in report.sites] == tokens
    for ours, theirs in zip(model.model.layers, reference.model.layers, strict=True):
        assert torch.equal(ours.mlp.experts.gate_up_proj, theirs.mlp.experts.gate_up_proj)
        # fp32 forward passes and Grams (1e-6) through a ridge system of condition ≤ 1/α, per K.
        torch.testing.assert_close(
            ours.mlp.experts.down_proj, theirs.mlp.experts.down_proj, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    ("family", "sites"),
    [*((family, "experts") for family in MIXTURES), ("qwen2_moe", "shared_experts,experts")],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@torch.no_grad()
def test_experts_share_in_undoing_the_drift(family, sites, weighted, tiny_model, tiny_batches):
    model = tiny_model(family)
    batches, dense = padded(tiny_batches(count=12, length=24)), copy.deepcopy(model)
    settings = {"selector": "magnitude", "alpha": ALPHA, "toward": "zero", "multiple": 1}
    settings |= {"sites": tuple(sites.split(",")), "drift_correction": 1}
    settings["token_weights"] = weighted
    report = grail.compress(model, batches, keep=0.5, progress=False, **settings)
    experts = [row for row in report.sites if row.kind == "experts"]
    assert {row.drift_correction for row in experts if row.block} == {1.0}  # none before the first

    # The second block as it was, behind the first one as it became; an expert that every token
    # goes to comes before the others, which undo what it leaves.
    half = copy.deepcopy(dense)
    half.model.layers[0] = copy.deepcopy(model.model.layers[0])
    if "shared" in sites:
        assert report.sites[0].kind == "shared_experts"
        half.model.layers[1].mlp.shared_expert = model.model.layers[1].mlp.shared_expert
    wanted, found, routes = [], [], []
    experts = half.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: routes.append(args[:3]))
    for network, seen in ((dense, wanted), (half, found)):
        network.model.layers[1].register_forward_hook(lambda _, __, y, s=seen: s.append(y))
        for batch in batches:
            network(**batch)
    narrow = model.model.layers[1].mlp.experts
    shared = 0
    for number in range(experts.num_experts):
        gate_up, down = experts.gate_up_proj[number].double(), experts.down_proj[number].double()
        gate, up = gate_up.chunk(2)
        inputs, targets = [], []
        for batch, aim, landed, (hidden, chosen, weights) in zip(
            batches, wanted, found, routes, strict=True
        ):
            counts = batch["attention_mask"].flatten().bool()
            token, choice = torch.where((chosen == number) & counts[:, None])
            x = hidden[token].double()
            x = nn.functional.silu(x @ gate.T) * (x @ up.T)
            missing = (aim - landed).flatten(0, -2)[token].double()
            share = weights[token, choice] / weights[token].square().sum(-1)
            there = aim.flatten(0, -2)[token].double()
            norms = (there.square().mean(-1, keepdim=True) + 1e-6).sqrt() if weighted else 1
            inputs.append(x / norms)
            targets.append((x @ down.T + share.double()[:, None] * missing) / norms)
        x, target = torch.cat(inputs), torch.cat(targets)
        shared += float((target - x @ down.T).square().sum())
        scores = gate_up.view(2, -1, 48).square().sum((0, 2))
        kept = scores.topk(40).indices.sort().values
        inner = x[:, kept].T @ x[:, kept]
        ridge = ALPHA * inner.diagonal().mean() * torch.eye(40)
        expected = target.T @ x[:, kept] @ torch.linalg.inv(inner + ridge)
        # fp32 forward passes and Grams (1e-6) through a ridge system of condition ≤ 1/α, per K.
        torch.testing.assert_close(narrow.down_proj[number], expected.float(), rtol=2e-3, atol=2e-3)
    assert shared > 0


def test_what_the_experts_of_a_token_add_is_all_of_its_drift():
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    drift = torch.randn(1, 2, 7)
    total = torch.zeros(2, 7)
    for choice in range(2):  # as if every choice were an expert
        shares = weights[:, choice] / weights.square().sum(-1)
        part = Routed(torch.arange(2), shares).drift(drift)
        total += weights[:, choice, None] * part
    torch.testing.assert_close(total, drift[0])


def test_shares_of_drift_are_not_rounded_to_16_bits(tiny_model):
    model, weights, heard = tiny_model("qwen3_moe").bfloat16(), [], []
    (first, *_) = find(model).sites(("experts",))
    with ExitStack() as hooks, torch.no_grad():
        layer = model.model.layers[0].mlp.experts
        hooks.callback(layer.register_forward_pre_hook(lambda _, a: weights.append(a[2])).remove)
        for site in first:
            hooks.enter_context(site.consumers[0].watch(lambda _, routed: heard.append(routed)))
        model(torch.arange(40)[None])
    (given,) = weights
    assert given.dtype == torch.bfloat16
    expected = given.double() / given.double().square().sum(-1, keepdim=True)
    shares = torch.cat([routed.shares for routed in heard]).double()
    torch.testing.assert_close(shares.sort()[0], expected.flatten().sort()[0], rtol=1e-6, atol=0)


def test_experts_that_undo_nothing_for_want_of_tokens_do_not_speak_for_their_layer():
    def row(name, block, tokens, share):
        nothing = {"alpha": None, "damping": 0.0, "retries": 0, "error": None}
        return SiteReport(
            name=name, kind="experts", block=block, channels=8, kept=4, tokens=tokens,
            drift_correction=share, baseline_error=None, **nothing,
        )  # fmt: skip

    rows = [row("a", 0, 90, 0.1), row("b", 1, 90, 0.6), row("c", 1, 10, 0.5), row("d", 1, 0, 0.0)]
    assert last_share(rows, "experts") == pytest.approx(0.59)
    assert last_share(rows, "mlp") == 0.0


def test_held_out_sequences_stay_held_out_in_every_expert(tiny_model, tiny_batches):
    from grail.calibrate.stream import Stream
    from grail.recipe import Recipe
    from grail.statistics.site_statistics import SiteStatistics

    model, batches = tiny_model("mixtral"), tiny_batches(count=5, length=24)
    architecture = find(model)
    stream = Stream(model, architecture.blocks, batches)
    sites = architecture.sites(("experts",))[0]
    for site in sites[:2]:
        (consumer,) = site.consumers
        statistics = SiteStatistics(site, consumer, stream, Recipe())
        chosen = []
        experts = model.model.layers[0].mlp.experts
        note = experts.register_forward_pre_hook(lambda _, args, c=chosen: c.append(args[1]))
        for batch in range(len(stream)):
            with (
                torch.no_grad(),
                consumer.watch(
                    lambda x, places, b=batch, s=statistics: s.update(b, x, None, places)
                ),
            ):
                stream.run(0, batch)
        note.remove()
        mine = torch.stack(chosen).eq(sites.index(site)).any(2).view(10, 24)
        assert statistics.held_out.tokens == int(mine[[4, 9]].sum())  # every fifth of ten
        assert statistics.tokens == int(mine.sum())


def with_a_deaf_expert(model):
    """Two pairs of opposite router rows: the better of each is above zero, where the rest are."""
    for layer in model.model.layers:
        router = layer.mlp.gate.weight.detach()
        router[1], router[3], router[4:] = -router[0], -router[2], 0
    return model


def test_an_expert_without_enough_tokens_is_only_pruned_and_says_so(tiny_model, tiny_batches):
    model = with_a_deaf_expert(tiny_model("qwen3_moe", num_experts=6))
    dense = copy.deepcopy(model)
    report = grail.compress(model, tiny_batches(count=10), keep=0.5, progress=False)
    unheard = [row for row in report.sites if row.tokens == 0]
    assert [row.name for row in unheard] == [
        f"model.layers.{block}.mlp.experts.{number}" for block in range(2) for number in (4, 5)
    ]
    for row in unheard:
        assert (row.error, row.baseline_error, row.alpha) == (None, None, None)
        assert (
            f"{row.name}: 0 tokens are too few to fit 40 channels, so it was only pruned"
            in report.notes
        )
    before, after = (m.model.layers[0].mlp.experts for m in (dense, model))
    scores = before.gate_up_proj[4].detach().double().view(2, 80, 48).square().sum((0, 2))
    kept = scores.topk(40).indices.sort().values
    assert torch.equal(after.down_proj[4], before.down_proj[4][:, kept])
    grail.Report.from_json(report.to_json())


def test_a_run_leaves_the_way_in_which_experts_run_as_it_was(tiny_model, tiny_batches):
    model = tiny_model("mixtral")
    chosen = model.get_experts_implementation()
    grail.compress(model, tiny_batches(), keep=0.5, progress=False)
    assert model.get_experts_implementation() == chosen
    assert all("forward" not in layer.mlp.experts.__dict__ for layer in model.model.layers)
    assert {layer.mlp.experts.intermediate_dim for layer in model.model.layers} == {40}


def test_a_failed_run_leaves_all_experts_as_they_were(tiny_model, tiny_batches):
    model = tiny_model("mixtral")
    before, calls = dict(model.named_parameters()), []

    def fails_in_the_second_layer(view):
        calls.append(view)
        if len(calls) > 6:
            raise RuntimeError("no more")
        return view.width.best(view.rows.norm(dim=1))

    with pytest.raises(RuntimeError, match="no more"):
        grail.compress(
            model, tiny_batches(), selector=fails_in_the_second_layer, keep=0.5, progress=False
        )
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(layer.mlp.experts.intermediate_dim == 80 for layer in model.model.layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keep": {"model.layers.0.mlp.experts.0": 0.5, "experts": 0.7}},
            "share a tensor, so they need one width",
        ),
        ({"selector": "wanda++"}, "needs the gradient of its weight"),
        ({"compensate": False, "fit_bias": True}, "has no bias"),
    ],
)
def test_what_a_shared_tensor_cannot_hold_is_refused(settings, message, tiny_model, tiny_batches):
    model = tiny_model("mixtral")
    before = dict(model.named_parameters())
    with pytest.raises(InputError, match=message):
        grail.compress(model, tiny_batches(), **{"keep": 0.5, **settings}, progress=False)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_blocks_without_experts_stay_as_they_are(tiny_model, tiny_batches):
    model = tiny_model("qwen3_moe", mlp_only_layers=[0])
    plain = model.model.layers[0].mlp.down_proj.weight
    report = grail.compress(model, tiny_batches(count=20), keep=0.5, progress=False)
    assert {row.block for row in report.sites} == {1}
    assert model.model.layers[0].mlp.down_proj.weight is plain


def test_experts_of_a_layer_are_collected_in_one_pass(tiny_model, tiny_batches):
    model, runs = tiny_model("mixtral", num_hidden_layers=1), []
    batches = tiny_batches()
    model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda *_: runs.append(None))
    grail.compress(model, batches, keep=0.5, drift_correction=0, progress=False)
    # Of the narrow network one more; two batches are rehearsed likewise.
    assert len(runs) == (2 + 1) + (len(batches) + 1)
    assert len(list(itertools.chain(*find(model).sites(("experts",))))) == 4


def test_tokens_of_all_experts_can_wait_for_one_launch(
    monkeypatch, ragged_launches, tiny_model, tiny_batches, no_rehearsal
):
    model, batches = tiny_model("qwen3_moe"), padded(tiny_batches(count=12, length=24))
    at_once, later = copy.deepcopy(model), model
    grail.compress(at_once, batches, keep=0.5, progress=False)
    # As on a GPU: on a CPU nothing waits unless it is asked to.
    monkeypatch.setattr(passes, "RaggedGrams", functools.partial(RaggedGrams, buffer=10_000))
    report = grail.compress(later, batches, keep=0.5, progress=False)
    layers = len(model.model.layers)
    assert len(ragged_launches) == 2 * layers  # of those for the fit, and of those held out
    by_site = torch.tensor(ragged_launches).view(layers, 2, -1).sum(1).flatten()
    assert [row.tokens for row in report.sites] == by_site.tolist()
    for ours, theirs in zip(later.parameters(), at_once.parameters(), strict=True):
        # Sums in another order, through systems of condition ≤ 1e5.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("channels", "keep", "kept"), [(40, 0.3, 16), (24, 0.5, 16), (56, 0.4, 24)]
)
def test_narrow_experts_run_in_every_dtype(
    family, dtype, channels, keep, kept, tiny_model, tiny_batches
):
    name = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    model, batches = tiny_model(family, **{name: channels}).to(dtype), tiny_batches()
    report = grail.compress(model, batches, keep=keep, selector="magnitude", progress=False)
    assert {row.kept for row in report.sites} == {kept}
    for experts in ("grouped_mm", "eager"):
        model.set_experts_implementation(experts)
        with torch.no_grad():
            assert model(batches[0]).logits.isfinite().all()


@pytest.mark.parametrize(("channels", "multiple", "kept"), [(40, 10, 20), (44, 1, 22), (80, 3, 39)])
def test_a_width_that_grouped_products_do_not_take_is_refused(
    channels, multiple, kept, tiny_model, tiny_batches
):
    model = tiny_model("qwen3_moe", moe_intermediate_size=channels)
    with pytest.raises(InputError, match=f"{kept} of {channels} channels.*choose a multiple of 8"):
        grail.compress(model, tiny_batches(), keep=0.5, multiple=multiple, progress=False)


def test_an_expert_that_every_token_goes_to_has_any_width(tiny_model, tiny_batches):
    model, batches = tiny_model("qwen2_moe"), tiny_batches()
    settings = {"sites": ("shared_experts",), "multiple": 1, "progress": False}
    report = grail.compress(model, batches, keep=0.6, **settings)
    assert {row.kept for row in report.sites} == {19}
    with torch.no_grad():
        assert model(batches[0]).logits.isfinite().all()
