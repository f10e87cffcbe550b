"""Sites of equal sizes, such as the experts of a layer, are chosen for as one batch."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grail
from grail import select
from grail.algebra.width import ChannelWidth, HeadWidth
from grail.errors import NonFiniteError

H, O = 40, 9
SEARCHES = ("greedy", "backward", "slimgpt")


def site(number: int, width=None, share: float = 0.0, scale: float = 1.0) -> select.View:
    generator = torch.Generator().manual_seed(number)
    mixing = torch.randn(H, H, generator=generator) * torch.logspace(0, -1, H)[:, None]
    x = torch.randn(300, H, generator=generator) @ mixing * scale
    gram = grail.Gram(H)
    gram.update(x, drift=torch.randn(300, O, generator=generator) * scale)
    return select.View(
        producers=(torch.randn(H, 6, generator=generator),),
        consumer=torch.randn(O, H, generator=generator),
        gram=gram,
        width=width or ChannelWidth(H, 17),
        generator=torch.Generator().manual_seed(number),
        gradient=torch.rand(O, H, generator=generator),
        drift_correction=share,
    )


class Operators(TorchDispatchMode):
    """The operators of torch that run, and the numbers of threads that they may use."""

    def __init__(self):
        super().__init__()
        self.names, self.threads = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        self.threads.add(torch.get_num_threads())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept", [17, 36])
@pytest.mark.parametrize("name", select.names())
def test_sites_together_are_chosen_for_as_alone(name, kept):
    views = [site(number, ChannelWidth(H, kept), share=number / 4) for number in range(4)]
    alone = [select.get(name)(view) for view in views]
    views = [
        dataclasses.replace(v, generator=torch.Generator().manual_seed(n))
        for n, v in enumerate(views)
    ]
    for found, expected in zip(select.answers(select.get(name), views), alone, strict=True):
        assert torch.equal(found.lift(torch.eye(kept)), expected.lift(torch.eye(kept)))


@pytest.mark.parametrize("name", [*SEARCHES, "wanda"])
def test_heads_of_several_sites_are_chosen_for_as_alone(name):
    views = [site(number, HeadWidth(5, 2, 4, 3, 1)) for number in range(2)]
    for found, view in zip(select.answers(select.get(name), views), views, strict=True):
        assert torch.equal(found.index, select.get(name)(view).index)


def test_a_function_answers_for_each_site():
    views = [site(number) for number in range(3)]
    assert select.answers(lambda view: [view.generator.initial_seed()], views) == [[0], [1], [2]]


def test_scores_of_one_site_that_are_nan_are_refused_for_all():
    views = [site(number) for number in range(3)]
    broken = torch.full((H, 6), float("nan"))
    views[1] = dataclasses.replace(views[1], producers=(broken,))
    with pytest.raises(NonFiniteError, match="selector 'magnitude'"):
        select.answers(select.get("magnitude"), views)


@pytest.mark.parametrize("kept", [17, 36], ids=["keeping", "dropping"])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_adds_the_same_operators_whatever_the_number_of_sites(name, kept):
    def operators(count: int) -> Operators:
        views = [site(number, ChannelWidth(H, kept)) for number in range(count)]
        matrices = [view.gram.matrix() for view in views]  # its own operators do not count
        grams = [SimpleNamespace(matrix=lambda m=m: m, drift=None) for m in matrices]
        views = [dataclasses.replace(v, gram=gram) for v, gram in zip(views, grams, strict=True)]
        with Operators() as counted:
            select.answers(select.get(name), views)
        return counted

    few, many = operators(2), operators(6)
    # For each site its weight is copied next to the others, and its index checked on the host.
    own = {operator.split(".")[1] for operator in Counter(many.names) - Counter(few.names)}
    checks = {"_local_scalar_dense", "max", "min", "_unique2", "nonzero", "view", "detach"}
    assert own <= {"transpose", "copy_", *checks}


@pytest.mark.parametrize("name", ["greedy", "slimgpt"])
def test_operators_of_a_search_grow_with_panels_not_with_choices(name):
    # Parallel operators of a choice would wait at their threads' barriers, launches for the host.
    def operators(kept: int) -> int:
        generator = torch.Generator().manual_seed(0)
        gram = grail.Gram(400)
        gram.update(torch.randn(500, 400, generator=generator))
        weight = torch.randn(5, 400, generator=generator)
        width = ChannelWidth(400, kept)
        with Operators() as counted:
            select.get(name)(select.View((), weight, gram, width, torch.Generator()))
        return len(counted.names)

    few, many = (operators(kept) for kept in ((48, 96) if name == "greedy" else (352, 304)))
    assert many - few <= 3 * 80  # of 48 more choices, three panels


def test_small_operators_of_a_search_run_in_one_thread():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 100, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Operators() as counted:
            select.pivots.pivots(x.mT @ x, torch.randn(1, 100, 5, generator=generator), 50)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert counted.threads == {2, 1}  # 2 of the product above


@pytest.mark.parametrize("power", [-50, -20, 1, 30, 50])
@pytest.mark.parametrize("name", SEARCHES)
def test_activations_scaled_by_a_power_of_two_leave_the_same_channels(name, power):
    for kept in (17, 36):
        expected, found = (
            select.get(name)(site(3, ChannelWidth(H, kept), scale=scale)).index
            for scale in (1.0, 2.0**power)
        )
        assert torch.equal(found, expected)
