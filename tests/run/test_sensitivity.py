import copy
import functools
import itertools
from dataclasses import replace
from operator import sub
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import grail
from grail import networks, select
from grail.errors import InputError, ModelError, NonFiniteError, StateError
from grail.run import _sensitivity, budget, measurement
from grail.select import elimination, greedy, pivots
from tests import convnets
from tests.counting import injected
from tests.kills import Killed, killing


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def narrowed_alone(model, names, batches, keep):
    """A copy with some sites narrow, everything else being dense, by `grail.compress` itself."""
    other = copy.deepcopy(model)
    everything = [row.name for row in grail.compress(copy.deepcopy(model), batches, 1.0).sites]
    shares = {name: keep if name in names else 1.0 for name in everything}
    grail.compress(other, batches, shares, closed_loop=False, drift_correction=0, progress=False)
    return other


def divergence(model, other, batches):
    """KL of the predictions of two models, a token at a time, in fp64."""
    found = []
    with torch.no_grad():
        for batch in batches:
            batch = batch if isinstance(batch, dict) else {"input_ids": batch}
            p, q = (m(**batch).logits.double().softmax(-1) for m in (model, other))
            each = (p * (p.log() - q.log())).sum(-1)
            mask = batch.get("attention_mask")
            found += each[mask.bool()].tolist() if mask is not None else each.flatten().tolist()
    return sum(found) / len(found)


def test_a_sites_loss_is_the_divergence_of_the_network_in_which_it_alone_is_narrow(
    tiny_llama, tiny_batches
):
    model, batches = tiny_llama(), tiny_batches(count=5)
    before = bits(model)
    found = grail.sensitivity(model, batches, keep=0.5, progress=False)
    assert same(before, bits(model))
    assert list(found.losses) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for name, loss in found.losses.items():
        other = narrowed_alone(model, [name], batches[1:], 0.5)
        assert loss == pytest.approx(divergence(model, other, batches[:1]), rel=1e-4)
        assert loss > 0


def test_tokens_that_a_mask_hides_do_not_count(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=3)
    mask = torch.ones_like(batches[0])
    mask[0, -5:] = 0
    padded = [{"input_ids": batch, "attention_mask": mask} for batch in batches]
    found = grail.sensitivity(model, padded, keep=0.5, progress=False)
    other = narrowed_alone(model, ["model.layers.0.mlp"], padded[1:], 0.5)
    loss = found.losses["model.layers.0.mlp"]
    assert loss == pytest.approx(divergence(model, other, padded[:1]), rel=1e-4)


def test_without_logits_it_is_the_relative_error_of_the_output(tiny_model):
    model = tiny_model("bert")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(97, (2, 12), generator=generator) for _ in range(4)]
    found = grail.sensitivity(model, batches, keep=0.5, progress=False)
    for name, loss in found.losses.items():
        other = narrowed_alone(model, [name], batches[1:], 0.5)
        with torch.no_grad():
            dense, now = (m(batches[0]).last_hidden_state.double() for m in (model, other))
        expected = (now - dense).square().sum() / dense.square().sum()
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_experts_of_a_layer_share_one_width(tiny_model, tiny_batches):
    model, batches = tiny_model("mixtral"), tiny_batches(count=4)
    found = grail.sensitivity(model, batches, keep=0.5, progress=False)
    assert [len(part.names) for part in found.parts] == [4, 4]
    other = narrowed_alone(model, found.parts[0].names, batches[1:], 0.5)
    expected = divergence(model, other, batches[:1])
    assert found.parts[0].loss == pytest.approx(expected, rel=1e-4)
    report = grail.compress(model, batches, found.shares(), progress=False)
    assert len({row.kept for row in report.sites if row.block == 0}) == 1


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.8])
def test_no_feasible_widths_of_as_many_parameters_promise_less_loss(keep, tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=5)
    found = grail.sensitivity(model, batches, keep=0.5, multiple=4, progress=False)
    shares = found.shares(keep, undone=0.25)
    first, second = found.parts

    def promised(a, b):
        return 0.75 * first.loss_at(a) + second.loss_at(b)

    chosen = [round(share * 80) for share in shares.values()]
    assert sum(chosen) <= keep * 160
    assert all(width % 4 == 0 and width >= 0.5 * keep * 80 for width in chosen)
    every = itertools.product(range(4, 81, 4), repeat=2)
    allowed = [w for w in every if sum(w) <= keep * 160 and min(w) >= 0.5 * keep * 80]
    # Where a curve is not convex the last step may be left out.
    assert promised(*chosen) <= 1.05 * min(promised(*w) for w in allowed)
    report = grail.compress(model, batches, shares, multiple=4, progress=False)
    assert [row.kept for row in report.sites] == chosen


def test_the_more_later_sites_undo_the_less_stays_of_the_first(tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=3), tiny_batches(count=5)
    found = grail.sensitivity(model, batches, keep=0.5, multiple=1, progress=False)
    first = [next(iter(found.shares(undone=undone).values())) for undone in (0.0, 0.5, 0.99)]
    assert first == sorted(first, reverse=True)
    assert first[0] > first[-1]
    with pytest.raises(InputError, match="undone"):
        found.shares(undone=1.0)


BOTH = ("mlp", "heads")


@pytest.mark.parametrize("shape", [(6, 3), (6, 6), (6, 1)], ids=["grouped", "each", "one group"])
def test_errors_of_heads_are_those_of_a_ridge_with_the_heads_that_greedy_keeps(
    shape, tiny_llama, tiny_batches
):
    queries, groups = shape
    model = tiny_llama(num_attention_heads=queries, num_key_value_heads=groups)
    (batch,) = tiny_batches(count=1, rows=1, length=64)  # alike, so whichever are held out
    found = grail.sensitivity(model, [batch] * 5, 0.5, BOTH, progress=False)
    heads = [part for part in found.parts if part.names[0].endswith("self_attn")]
    assert len(heads) == 2
    for block, part in enumerate(heads):
        layer, read = model.model.layers[block].self_attn.o_proj, []
        with layer.register_forward_pre_hook(lambda _, x, to=read: to.append(x[0])):
            model(batch)
        x = read[0][0].detach().double()
        (site,) = networks.find(model, ("heads",)).sites(("heads",))[block]
        gram = grail.Gram(len(x.T))
        gram.update(x.float())
        weight = layer.weight.detach().double()
        damping = (elimination.DAMPING * x.square().sum(0).mean()).sqrt()
        rows = torch.cat([x, damping * torch.eye(len(x.T), dtype=x.dtype)])  # of a ridge
        errors = []
        for kept in part.widths:
            width = site.width(kept / len(x.T), None)
            view = select.View((), weight.float(), gram, width, torch.Generator())
            stay = select.get("greedy")(view).index
            assert len(stay) == kept
            fitted = torch.linalg.lstsq(rows[:, stay], rows @ weight.T).solution
            errors.append((rows[:, stay] @ fitted - rows @ weight.T).square().sum())
        ratios = torch.stack(errors) / errors[0]
        assert part.widths[-1] == len(x.T)
        assert (part.errors / part.errors[0]).tolist() == pytest.approx(ratios.tolist(), rel=1e-4)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("keep", [0.4, 0.55, 0.7, 0.85])
def test_mlps_and_heads_share_one_budget_and_no_feasible_widths_promise_less(
    keep, tiny_llama, tiny_batches
):
    model, batches = tiny_llama(), tiny_batches(count=5)
    dense = parameters(model)
    found = grail.sensitivity(model, batches, 0.5, BOTH, multiple=8, progress=False)
    assert list(found.losses) == [
        *("model.layers.0.self_attn", "model.layers.0.mlp"),
        *("model.layers.1.self_attn", "model.layers.1.mlp"),
    ]
    for name, loss in found.losses.items():
        other = copy.deepcopy(model)
        shares = {each: 0.5 if each == name else 1.0 for each in found.losses}
        settings = {"closed_loop": False, "drift_correction": 0, "progress": False}
        grail.compress(other, batches[1:], shares, BOTH, **settings)
        assert loss == pytest.approx(divergence(model, other, batches[:1]), rel=1e-4)
    shares = found.shares(keep, undone=0)
    chosen = [round(shares[part.names[0]] * part.channels) for part in found.parts]
    of_sites = sum(part.parameters[-1] for part in found.parts)

    def costs(widths):
        pairs = zip(found.parts, widths, strict=True)
        return sum(part.parameters[part.widths.index(width)] for part, width in pairs)

    def promised(widths):
        return sum(part.loss_at(k) for part, k in zip(found.parts, widths, strict=True))

    options = [[k for k in p.widths if k >= 0.5 * keep * p.channels] for p in found.parts]
    allowed = [w for w in itertools.product(*options) if costs(w) <= keep * of_sites]
    assert costs(chosen) <= keep * of_sites
    # Heads are wide steps: where the next one does not fit, its share goes to narrower ones.
    assert promised(chosen) <= 1.15 * min(map(promised, allowed))
    report = grail.compress(model, batches, shares, BOTH, multiple=8, progress=False)
    assert [row.kept for row in report.sites] == chosen
    assert dense - parameters(model) == of_sites - costs(chosen)


def test_guard_text_counts_as_much_as_the_probes(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=5)
    guard = tiny_batches(count=4, length=9, seed=5)
    measure = functools.partial(grail.sensitivity, model, batches, 0.5, probes=2, progress=False)
    alone, both = measure(), measure(guard=iter(guard))
    for part, other in zip(alone.parts, both.parts, strict=True):
        assert torch.equal(part.errors, other.errors)
    for name, loss in both.losses.items():
        other = narrowed_alone(model, [name], batches[2:], 0.5)
        texts = (batches[:2], guard[:2])
        first, second = (divergence(model, other, text) for text in texts)
        assert alone.losses[name] == pytest.approx(first, rel=1e-4)
        assert loss == pytest.approx((first + second) / 2, rel=1e-4)


def test_grouped_convolutions_are_refused():
    first, second = torch.nn.Conv2d(4, 16, 3, groups=4), torch.nn.Conv2d(16, 5, 1)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    site = grail.Site(["0"], ["2"])
    batches = [torch.randn(2, 4, 9, 9) for _ in range(3)]
    with pytest.raises(InputError, match="equally many channels of each group"):
        grail.sensitivity(model, batches, 0.5, [site], progress=False)


def test_convolutions_have_shares_too():
    model, batches = convnets.network("torchvision-basic"), convnets.images(count=6)
    found = grail.sensitivity(model, batches, keep=0.5, progress=False)
    assert set(found.losses) == {
        row.name for row in grail.compress(copy.deepcopy(model), batches, 1.0).sites
    }
    report = grail.compress(model, batches, found.shares(), progress=False)
    stay = sum(
        part.parameters[part.widths.index(row.kept)]
        for part, row in zip(found.parts, report.sites, strict=True)
    )
    half = 0.5 * sum(part.parameters[-1] for part in found.parts)
    steps = (max(map(sub, part.parameters[1:], part.parameters)) for part in found.parts)
    assert half - max(steps) < stay <= half


def test_errors_are_those_of_least_squares_on_each_prefix_of_the_search():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 200, generator=generator).double() * torch.logspace(0, -1, 12)[:, None]
    x[5] = x[2] - 0.5 * x[7]
    weight = torch.randn(7, 12, generator=generator).double()
    gram = x @ x.T
    order = pivots.pivots(gram.float()[None], (gram @ weight.T).float()[None], 12)[0]
    found = greedy.errors(x @ x.T, weight)
    wanted = weight @ x
    for kept in range(13):
        rows = x[order[:kept]]
        fitted = torch.linalg.lstsq(rows.T, wanted.T, driver="gelsd").solution.T @ rows
        # Damped by 3e-5 of the mean energy: that much of what W weighs is left.
        assert found[kept] == pytest.approx(float((wanted - fitted).square().sum()), abs=0.3)
    assert found[12] == 0
    assert bool((found.diff() <= 0).all())


def test_silence_loses_nothing():
    found = greedy.errors(torch.zeros(4, 4).double(), torch.ones(2, 4).double())
    assert found.tolist() == pytest.approx([0] * 5, abs=1e-300)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guard": []}, "guard holds no batch"),
        ({"keep": 1.0}, "narrows nothing"),
        ({"keep": 0.0}, "keep must be"),
        ({"probes": 3}, "not all"),
        ({"probes": 0}, "not all"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, message, tiny_llama, tiny_batches):
    model = tiny_llama()
    before = bits(model)
    with pytest.raises(InputError, match=message):
        grail.sensitivity(model, tiny_batches(count=3), progress=False, **settings)
    assert same(before, bits(model))


@pytest.fixture
def kill(monkeypatch):
    """`kill(after)`: the next measurement ends once it has kept so many blocks; None: never."""
    return killing(measurement.Measurement, "write", monkeypatch)


CASES = {
    "llama": ("llama", {}),
    "experts": ("qwen3_moe", {"sites": "experts"}),
    "encoder": ("bert", {"selector": "wanda"}),
    "heads and guard": (
        "llama",
        {"sites": ("mlp", "heads"), "guard": [torch.arange(24)[None] + 3]},
    ),
}


@pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=CASES)
def test_a_measurement_that_was_killed_goes_on_and_finds_the_same(
    family, settings, kill, tiny_model, tiny_batches, monkeypatch, tmp_path
):
    model = tiny_model(family, num_hidden_layers=3)
    batches = [batch[:, :12] for batch in tiny_batches(count=4)]
    measure = functools.partial(grail.sensitivity, model, batches, progress=False, **settings)
    calls = []
    of_part = _sensitivity._errors
    monkeypatch.setattr(_sensitivity, "_errors", lambda *given: calls.append(1) or of_part(*given))
    expected = measure()
    of_all = len(calls)
    kill(2)
    with pytest.raises(Killed):
        measure(resume_dir=tmp_path)
    kill(None)
    calls.clear()
    before = bits(model)
    found = measure(resume_dir=tmp_path)
    assert same(before, bits(model))
    assert 0 < len(calls) < of_all / 2  # what was kept was not measured again
    for one, other in zip(found.parts, expected.parts, strict=True):
        assert torch.equal(one.errors, other.errors)
        assert replace(one, errors=other.errors) == other
    assert found.shares() == expected.shares()


def test_a_measurement_that_ended_runs_nothing(tiny_llama, tiny_batches, tmp_path):
    model, batches = tiny_llama(), tiny_batches(count=3)
    expected = grail.sensitivity(model, batches, resume_dir=tmp_path, progress=False)
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    again = grail.sensitivity(model, batches, resume_dir=tmp_path, progress=False)
    assert again.losses == expected.losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0.75}, "keep was 0.7 and is 0.75"),
        ({"probes": 2}, "probes was 1 and is 2"),
        ({"batches": slice(2)}, "calibration differs"),
        ({"guard": [torch.arange(24)[None]]}, "guard text differs"),
        ({"selector": lambda view: view.width.best(view.gram.diagonal())}, "given by its name"),
    ],
)
def test_another_measurement_in_the_folder_is_refused(
    changes, message, tiny_llama, tiny_batches, tmp_path
):
    model, batches = tiny_llama(), tiny_batches(count=3)
    settings = {"resume_dir": tmp_path, "progress": False}
    grail.sensitivity(model, batches, **settings)
    batches = batches[changes.pop("batches", slice(3))]
    with pytest.raises(InputError, match=message):
        grail.sensitivity(model, batches, **settings, **changes)


def test_a_damaged_measurement_is_named(tiny_llama, tiny_batches, tmp_path):
    model, batches = tiny_llama(), tiny_batches(count=3)
    settings = {"resume_dir": tmp_path, "progress": False}
    expected = grail.sensitivity(model, batches, **settings)
    path = tmp_path / "sensitivity.state"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    injected("damaged state files")
    with pytest.raises(StateError, match=r"sensitivity\.state.*delete it to measure anew"):
        grail.sensitivity(model, batches, **settings)
    path.unlink()
    assert grail.sensitivity(model, batches, **settings).losses == expected.losses


def test_outputs_that_are_not_finite_are_refused_and_nothing_stays_narrow(
    tiny_llama, tiny_batches, monkeypatch
):
    model, batches = tiny_llama(), tiny_batches(count=3)
    before = bits(model)
    kl = F.kl_div
    monkeypatch.setattr(F, "kl_div", lambda *a, **k: kl(*a, **k) * float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        grail.sensitivity(model, batches, progress=False)
    assert same(before, bits(model))


class Wordy(torch.nn.Module):
    """A network that answers in words."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 20), torch.nn.Linear(20, 6)

    def forward(self, x):
        self.second(self.first(x).relu())
        return "words"


def test_a_network_that_returns_no_tensor_is_refused():
    site = grail.Site(producers=["first"], consumers=["second"])
    batches = [torch.randn(30, 6) for _ in range(3)]
    with pytest.raises(ModelError, match="no tensor to compare"):
        grail.sensitivity(Wordy(), batches, sites=[site], progress=False)


def test_where_no_width_is_narrow_enough_the_nearest_is_taken(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches(count=3)
    found = grail.sensitivity(model, batches, keep=0.97, progress=False)
    assert set(found.shares().values()) == {1.0}  # multiples of 8 of 80
    found = grail.sensitivity(model, batches, keep=0.3, multiple=32, progress=False)
    assert set(found.shares().values()) == {0.4}


class Scored(torch.nn.Module):
    """A network that returns logits of some shape, and before them a number."""

    def __init__(self, shape):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 20), torch.nn.Linear(20, 30)
        self.shape = shape

    def forward(self, x):
        logits = self.second(self.first(x).relu()).unflatten(1, self.shape)
        return SimpleNamespace(logits=logits) if len(self.shape) != 2 else (logits.sum(), logits)


@pytest.mark.parametrize("shape", [(30, 1), (2, 5, 3)])
def test_what_is_no_prediction_is_compared_as_any_output(shape):
    site = grail.Site(producers=["first"], consumers=["second"])
    model, batches = Scored(shape), [torch.randn(40, 6) for _ in range(3)]
    loss = grail.sensitivity(model, batches, 0.5, [site], progress=False).parts[0].loss
    other = copy.deepcopy(model)
    grail.compress(other, batches[1:], 0.5, [site], drift_correction=0, progress=False)
    with torch.no_grad():
        dense, now = (m.second(m.first(batches[0]).relu()) for m in (model, other))
    assert loss == pytest.approx(
        float((now - dense).square().sum() / dense.square().sum()), rel=1e-4
    )


def test_tokens_that_are_not_finite_are_dropped_where_a_run_drops_them():
    site = grail.Site(producers=["first"], consumers=["second"])
    batches = [torch.randn(40, 6) for _ in range(3)]
    batches[2][7, 3] = torch.nan
    model = torch.nn.Sequential()
    model.first, model.second = torch.nn.Linear(6, 20), torch.nn.Linear(20, 6)
    with pytest.raises(NonFiniteError):
        grail.sensitivity(model, batches, sites=[site], progress=False)
    found = grail.sensitivity(model, batches, sites=[site], non_finite="drop", progress=False)
    assert found.parts[0].loss > 0


def test_probes_of_which_no_token_counts_are_refused(tiny_llama, tiny_batches):
    batches = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in tiny_batches()]
    batches[0]["attention_mask"] = torch.zeros_like(batches[0]["input_ids"])
    with pytest.raises(InputError, match="no token that counts"):
        grail.sensitivity(tiny_llama(), batches, progress=False)


def test_a_dense_network_that_is_not_finite_is_blamed_itself(tiny_llama, tiny_batches):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(ModelError, match="dense network's output is not finite"):
        grail.sensitivity(model, tiny_batches(), progress=False)


def test_loud_channels_that_say_the_same_are_damped_until_they_factor():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 30, generator=generator).double()
    gram = x @ x.T
    gram.diagonal().sub_(1e-4 * gram.diagonal().mean())  # as fp32 rounds loud channels
    found = greedy.errors(gram, torch.randn(8, 64, generator=generator).double())
    assert bool(found.isfinite().all())
    assert bool((found.diff() <= 0).all())


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.9])
def test_least_loss_is_the_least_of_all_allowed_widths_where_losses_are_convex(keep):
    losses = [{k: a * (6 - k) ** 2 for k in range(1, 7)} for a in (1.0, 3.0, 0.2)]
    widths = budget.least_loss(losses, keep, [1.0, 1.0, 1.0])

    def total(widths):
        return sum(site[width] for site, width in zip(losses, widths, strict=True))

    every = itertools.product(range(1, 7), repeat=3)
    assert sum(widths) <= keep * 18
    assert total(widths) == min(total(w) for w in every if sum(w) <= keep * 18)


def test_a_site_whose_loss_falls_in_a_straight_line_gets_its_widest():
    # By rounding, the second step of these seems to gain more than the first.
    losses = {k: 0.7142791936429349 - 0.3 * k for k in (8, 23, 29)}
    assert budget.least_loss([losses], 1.0, [0.7]) == [29]


def test_least_loss_counts_parameters_not_channels():
    losses = [{1: 1.0, 2: 0.0}, {1: 1.0, 2: 0.0}]
    assert budget.least_loss(losses, 0.8, [10.0, 1.0]) == [1, 2]
    assert budget.least_loss(losses, 0.75, [1.0, 10.0]) == [2, 1]


def test_least_loss_counts_the_parameters_of_each_width():
    # Heads of one width may share more of them than those of a narrower one.
    losses = [{1: 3.0, 2: 2.0, 3: 1.0, 4: 0.0}, {1: 1.0, 2: 0.0}]
    costs = [{1: 4.0, 2: 8.0, 3: 6.0, 4: 10.0}, 5.0]
    every = list(itertools.product((1, 2, 3, 4), (1, 2)))
    for keep in (0.45, 0.55, 0.6, 0.7, 0.8, 0.95, 1.0):
        fits = [(a, b) for a, b in every if costs[0][a] + 5 * b <= keep * 20]
        least = min(losses[0][a] + losses[1][b] for a, b in fits)
        a, b = budget.least_loss(losses, keep, costs)
        assert (a, b) in fits
        assert losses[0][a] + losses[1][b] == least
    with pytest.raises(InputError, match="at the widths of its losses"):
        budget.least_loss(losses, 0.5, [{1: 4.0}, 5.0])


def test_least_loss_steps_over_a_width_that_is_no_better_than_its_neighbours_line():
    # Alone the step from 1 to 2 gains nothing, that from 1 to 3 does.
    losses = [{1: 3.0, 2: 3.0, 3: 0.0}, {1: 1.0, 2: 0.5, 3: 0.0}]
    assert budget.least_loss(losses, 4 / 6) == [3, 1]


def test_least_loss_spends_what_fits_to_the_last_parameter():
    losses = [{k: float(80 - k) for k in range(8, 81, 8)}] * 2
    assert sum(budget.least_loss(losses, 0.7, [144.0, 144.0])) == 112  # 0.7 is no binary fraction
    concave = [{k: (10 - k) ** 0.5 for k in range(1, 11)}] * 2
    assert sum(budget.least_loss(concave, 0.5)) == 10


@pytest.mark.parametrize(
    ("losses", "keep", "parameters", "message"),
    [
        ([], 0.5, None, "losses of every site"),
        ([{}], 0.5, None, "losses of every site"),
        ([{1: 0.0}], 0.5, [1.0, 2.0], "losses of every site"),
        ([{1: float("nan")}], 0.5, None, "finite"),
        ([{4: 1.0, 8: 0.0}], 0.4, None, "least widths"),
        ([{4: 1.0, 8: 0.0}], 1.5, None, "keep must be"),
    ],
)
def test_budgets_that_cannot_be_are_refused(losses, keep, parameters, message):
    with pytest.raises(InputError, match=message):
        budget.least_loss(losses, keep, parameters)
