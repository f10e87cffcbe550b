"""Guard text and text that selects, in runs."""

import itertools

import pytest
import torch

import grail
from bench.tools.tiny import VOCABULARY
from grail.calibrate.stream import Role, Stream
from grail.errors import EmptyCalibrationError, InputError
from tests import processes

HALF = VOCABULARY // 2


def tokens(low: int, high: int, count: int = 5, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (4, 16), generator=generator) for _ in range(count)]


@pytest.fixture
def calibration() -> list[torch.Tensor]:
    return tokens(3, 12)


@pytest.fixture
def guard() -> list[torch.Tensor]:
    return tokens(HALF, VOCABULARY, seed=1)


def last_channels(view: grail.select.View) -> torch.Tensor:
    return torch.arange(view.width.channels, dtype=torch.float32)


def error_of_first_mlp(dense, model, batches) -> float:
    """‖W x − W' x'‖ of the first block's MLP on some text, from its layers alone."""
    reads, returns = [], []
    for network, kept in ((dense, returns), (model, reads)):
        mlp = network.model.layers[0].mlp
        with mlp.register_forward_hook(lambda _, __, y, kept=kept: kept.append(y)), torch.no_grad():
            for batch in batches:
                network(batch)
    return torch.cat([a - b for a, b in zip(returns, reads, strict=True)]).norm().item()


def test_where_texts_disagree_nothing_is_worse_than_pruned_on_the_guard(
    tiny_llama, calibration, guard
):
    # Else a run that holds nothing out selects by other tokens.
    settings = {"keep": 0.5, "progress": False, "selector": last_channels}
    errors = {}
    for name, more in (
        ("pruned", {"compensate": False}),
        ("alone", {}),
        ("with", {"guard": guard}),
    ):
        model = tiny_llama()
        report = grail.compress(model, calibration, **settings, **more)
        errors[name] = error_of_first_mlp(tiny_llama(), model, guard)
    assert errors["alone"] > errors["pruned"]
    assert errors["with"] <= errors["pruned"] * (1 + 1e-5)
    for row in report.sites:
        assert row.guard_error <= row.guard_baseline_error
        assert row.error <= row.baseline_error
    first = report.sites[0]
    ratio = errors["with"] / errors["pruned"]
    assert first.guard_error / first.guard_baseline_error == pytest.approx(ratio, rel=1e-3)
    assert report.calibration["tokens"] == first.tokens == 5 * 4 * 16
    assert report.calibration["guard_tokens"] == 5 * 4 * 16
    assert any(note.startswith("guard text: of 2 consumers") for note in report.notes)


def test_refitted_producers_are_judged_by_the_guard_too(tiny_llama, calibration, guard):
    settings = {"keep": 0.5, "progress": False, "selector": last_channels}
    errors = {}
    for name, more in (
        ("pruned", {"compensate": False}),
        ("refitted", {"refit_producers": 3}),
        ("guarded", {"refit_producers": 3, "guard": guard}),
    ):
        model = tiny_llama()
        report = grail.compress(model, calibration, **settings, **more)
        errors[name] = error_of_first_mlp(tiny_llama(), model, guard)
    assert errors["refitted"] > errors["pruned"]
    assert errors["guarded"] <= errors["pruned"] * (1 + 1e-5)
    first = report.sites[0]
    ratio = errors["guarded"] / errors["pruned"]
    assert first.guard_error / first.guard_baseline_error == pytest.approx(ratio, rel=1e-3)


def test_guard_text_selects_nothing_and_joins_no_fit(tiny_llama, calibration, guard):
    seen = []

    def selector(view: grail.select.View) -> torch.Tensor:
        seen.append(view.gram.matrix())
        return view.gram.energy

    for more in ({}, {"guard": guard}):
        grail.compress(tiny_llama(), calibration, 0.5, selector=selector, progress=False, **more)
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-6, atol=1e-6)


def test_text_that_selects_is_all_that_selectors_see(tiny_llama, calibration, guard):
    seen = []

    def selector(view: grail.select.View) -> torch.Tensor:
        seen.append(view.gram)
        return view.gram.energy

    settings = {"keep": 0.5, "selector": selector, "progress": False}
    report = grail.compress(tiny_llama(), calibration, select_on=guard, **settings)
    assert report.calibration["select_tokens"] == 5 * 4 * 16
    assert {row.tokens for row in report.sites} == {5 * 4 * 16}
    grail.compress(tiny_llama(), guard, alpha=1e-3, drift_correction=0.0, **settings)
    # In the first block the compressed network is the dense one, on any text.
    torch.testing.assert_close(seen[0].matrix(), seen[2].matrix(), rtol=1e-5, atol=1e-6)
    assert seen[1].drift is not None


def test_gradients_are_of_the_text_that_selects(tiny_llama, calibration, guard):
    settings = {"keep": 0.5, "selector": "wanda++", "alpha": 1e-3, "drift_correction": 0}
    kept = []
    for batches, more in (
        (guard, {}), (calibration, {"select_on": guard}), (calibration, {}),
    ):  # fmt: skip
        model = tiny_llama(num_hidden_layers=1)
        grail.compress(model, batches, progress=False, **settings, **more)
        kept.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_have_a_guard_each(family, tiny_model, calibration, guard):
    model = tiny_model(family)
    report = grail.compress(model, calibration, keep=0.5, guard=guard, progress=False)
    rows = [row for row in report.sites if row.guard_error is not None]
    assert rows
    assert all(row.guard_error <= row.guard_baseline_error for row in rows)


def test_the_open_loop_has_a_guard_too(tiny_llama, calibration, guard):
    settings = {"keep": 0.5, "progress": False, "closed_loop": False}
    report = grail.compress(tiny_llama(), calibration, guard=guard, **settings)
    assert all(row.guard_error <= row.guard_baseline_error for row in report.sites)


def test_batches_are_dealt_by_role(tiny_llama):
    model = tiny_llama()
    others = {Role.GUARD: tokens(3, 9, count=2), Role.SELECT: tokens(3, 9, count=1)}
    stream = Stream(model, model.model.layers, tokens(3, 9, count=2), others=others)
    roles = [stream.by_role(batch, holds_out=True) for batch in range(len(stream))]
    held = [rows.get(Role.HELD_OUT) for rows in roles]
    # Every fifth of eight sequences: the fifth, which is the first of the second batch.
    assert [list(of) for of in roles] == [
        [Role.TRAIN], [Role.TRAIN, Role.HELD_OUT], [Role.GUARD], [Role.GUARD], [Role.SELECT],
    ]  # fmt: skip
    assert held[1].tolist() == [True, False, False, False]
    assert roles[1][Role.TRAIN].tolist() == [False, True, True, True]
    assert (stream.tokens, stream.samples, stream.own_tokens) == (2 * 64, 8, 5 * 64)
    assert dict(stream.tokens_by_role) == {Role.GUARD: 128, Role.SELECT: 64}
    part = stream.part([4, 1])
    assert [list(part.by_role(n, holds_out=False)) for n in (0, 1)] == [[Role.SELECT], [Role.TRAIN]]
    assert {next(iter(roles[batch])) for batch in stream.spread(0.5)} == {
        Role.TRAIN, Role.GUARD, Role.SELECT,
    }  # fmt: skip


def test_a_resumed_run_with_a_guard_ends_with_the_same_bits(
    tiny_llama, calibration, guard, tmp_path, monkeypatch
):
    settings = {"keep": 0.5, "progress": False, "guard": guard}
    expected = tiny_llama(num_hidden_layers=3)
    report = grail.compress(expected, calibration, **settings)
    from grail.run.block import BlockCompressor

    compress, blocks = BlockCompressor.compress, itertools.count()

    def dying(self, block, advance):
        # The rehearsal of the memory compresses blocks, too.
        if block == 2 and self.blocks.first_active >= 0:
            raise KeyboardInterrupt
        next(blocks)
        return compress(self, block, advance)

    model, folder = tiny_llama(num_hidden_layers=3), tmp_path / "state"
    monkeypatch.setattr(BlockCompressor, "compress", dying)
    with pytest.raises(KeyboardInterrupt):
        grail.compress(model, calibration, resume_dir=folder, **settings)
    monkeypatch.setattr(BlockCompressor, "compress", compress)
    others = {"guard": tokens(3, 9)}, {"guard": None}
    for other in others:
        with pytest.raises(InputError, match="guard text differs"):
            grail.compress(model, calibration, resume_dir=folder, **{**settings, **other})
    again = grail.compress(model, calibration, resume_dir=folder, **settings)
    assert again.resumed["after"] == 2
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own, other)
    assert again.sites == report.sites


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.1}, "which alpha=0.1 gives already"),
        ({"compensate": False}, "which compensate=False gives already"),
        ({"guard": []}, "guard text holds no token"),
        ({"guard": torch.ones(2, 3, dtype=torch.int64)}, "list"),
    ],
)
def test_a_guard_that_could_guard_nothing_is_refused(
    settings, message, tiny_llama, calibration, guard
):
    with pytest.raises((InputError, EmptyCalibrationError), match=message):
        grail.compress(tiny_llama(), calibration, **{"guard": guard, "progress": False, **settings})


def test_collected_statistics_take_no_guard(tiny_llama, calibration, guard, tmp_path):
    folder = grail.collect(tiny_llama(), calibration, output=tmp_path / "a", progress=False)
    settings = {"closed_loop": False, "progress": False}
    for name in ("guard", "select_on"):
        with pytest.raises(InputError, match="collected statistics come without batches"):
            grail.compress(tiny_llama(), grail.Collected(folder), **settings, **{name: guard})


def test_several_processes_guard_as_one(calibration, guard):
    options = {"keep": 0.5, "guard": guard, "select_on": guard[:1]}
    one, *several = (
        processes.run(count, processes.compressed, "llama", calibration, options)
        for count in (1, 2)
    )
    (alone,), (first, second) = one, several[0]
    assert first["rows"] == second["rows"]
    assert first["calibration"] == alone["calibration"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
        torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-3, atol=1e-4)


def written(folder, count):
    """Files of different random words."""
    texts = [folder / f"{number}.txt" for number in range(count)]
    for number, text in enumerate(texts):
        words = torch.randint(3, 90, (800,), generator=torch.Generator().manual_seed(number))
        text.write_text(" ".join(f"w{word}" for word in words.tolist()))
    return texts


def test_a_whole_workflow_takes_a_guard_and_names_it(tiny_folder, tmp_path):
    texts = written(tmp_path, 2)
    how = {"tokens": 128, "sequence_length": 16}
    report = grail.compress_checkpoint(
        tiny_folder,
        tmp_path / "out",
        grail.Text(str(texts[0]), **how),
        guard=grail.Text(str(texts[1]), **how),
        keep=0.5,
        progress=False,
    )
    assert report.calibration["guard_tokens"] == 128
    assert report.provenance["guard"]["source"] == str(texts[1])
    assert all(row.guard_error <= row.guard_baseline_error for row in report.sites)
    again = grail.Report.from_json((tmp_path / "out/report.json").read_text())
    assert again.sites == report.sites
    with pytest.raises(InputError, match=r"which alpha=0\.1 gives already"):
        grail.compress_checkpoint(
            tiny_folder, tmp_path / "other", texts[0], guard=texts[1], alpha=0.1
        )


def test_a_whole_workflow_selects_on_other_texts_and_names_them(tiny_folder, tmp_path):
    texts = written(tmp_path, 3)
    how = {"tokens": 128, "sequence_length": 16, "seed": 0}
    calibration = grail.Text(str(texts[0]), **how)
    settings = {"keep": 0.5, "progress": False}
    for out, select_on in (("mixed", texts[1:]), ("one", texts[1]), ("none", None)):
        report = grail.compress_checkpoint(
            tiny_folder, tmp_path / out, calibration, select_on=select_on, **settings
        )
        names = (
            [] if select_on is None else [str(texts[1])] if out == "one" else map(str, texts[1:])
        )
        source = report.provenance.get("select_on", {}).get("source", "")
        assert source == ", ".join(names)
    network, tokenizer = grail.load_model(tiny_folder)
    batches = calibration.batches(network, tokenizer)
    selecting = grail.Mixture(list(map(str, texts[1:])), **how | {"tokens": 16384})
    grail.compress(network, batches, select_on=selecting.batches(network, tokenizer), **settings)
    mixed, plain = (grail.load_model(tmp_path / out)[0].state_dict() for out in ("mixed", "none"))
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weight, mixed[name])
    assert any(not torch.equal(weight, plain[name]) for name, weight in mixed.items())
