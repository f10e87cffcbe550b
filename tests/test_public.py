"""Public calls: light to import, plain arguments accepted, other kinds refused by name."""

import ast
import inspect
import itertools
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grail
import grail_kernels as gk
from grail.errors import InputError
from tests.serving.gguf_files import dense_file

H, O = 11, 5
KEPT = [7, 0, 3]


def gram_of(x: torch.Tensor) -> grail.Gram:
    gram = grail.Gram(H)
    gram.update(x)
    return gram


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 40, H, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(O, H, generator=torch.Generator().manual_seed(1))


def test_importing_grail_imports_no_library_of_models_or_data():
    heavy = ("transformers", "datasets", "accelerate", "typer", "rich", "matplotlib", "scipy")
    code = (
        f"import sys; from grail import *; print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_functions_and_classes():
    for module in (grail, gk):
        for name in module.__all__:
            assert callable(getattr(module, name)) or name.isupper(), name
            assert name in dir(module)


def test_a_newcomer_sees_the_public_names_alone():
    shown = [name for name in dir(grail) if not name.startswith("__")]
    assert shown == sorted(grail.__all__)
    code = "import grail, grail.commands, grail.run.workflow; print(*dir(grail))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == dir(grail)


@pytest.mark.parametrize("imported", ["report._evaluate", "files._export", "commands"])
def test_a_name_stays_a_function_whatever_is_imported_after_it(imported):
    if imported == "commands":
        pytest.importorskip("typer")
    code = (
        f"import grail, grail.{imported}; print(callable(grail.evaluate), callable(grail.export))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_names_are_imported_when_they_are_asked_for():
    code = (
        "import sys, grail; early = 'torch' in sys.modules; grail.Selection; "
        "print(early, 'torch' in sys.modules, grail.select.names.__module__, grail.errors.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "grail.select", "grail.errors"]
    assert "__getattr__" in vars(grail)
    with pytest.raises(AttributeError, match="module 'grail' has no attribute 'nonsense'"):
        grail.nonsense  # noqa: B018


def test_type_checkers_find_each_name_where_it_is_imported_from():
    tree = ast.parse(inspect.getsource(grail))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in checked.body for alias in node.names}
    assert told == grail._MODULES
    assert sorted(told) == grail.__all__
    for name, module in told.items():
        assert getattr(grail, name) is getattr(sys.modules[module], name)


def test_everything_public_is_imported_by_a_star():
    names: dict[str, object] = {}
    exec("from grail import *", names)
    assert names.keys() - {"__builtins__"} == set(grail.__all__)
    assert pickle.loads(pickle.dumps(names["Recipe"](keep=0.5))) == grail.Recipe(keep=0.5)


# What is accepted.

INDICES: dict[str, Callable[[], Any]] = {
    "list": lambda: KEPT,
    "tuple": lambda: tuple(KEPT),
    "tensor": lambda: torch.tensor(KEPT),
    "int32": lambda: torch.tensor(KEPT, dtype=torch.int32),
    "array": lambda: np.array(KEPT),
    "reversed array": lambda: np.array(KEPT[::-1])[::-1],
    "read-only array": lambda: np.frombuffer(np.array(KEPT).tobytes(), dtype=np.int64),
    "unsigned": lambda: np.array(KEPT, dtype=np.uint8),
    "numpy integers": lambda: [np.int64(channel) for channel in KEPT],
}
MASKS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.tensor([channel in KEPT for channel in range(H)]),
    "array": lambda: np.array([channel in KEPT for channel in range(H)]),
    "list": lambda: [channel in KEPT for channel in range(H)],
}


@pytest.mark.parametrize("form", INDICES)
def test_an_index_is_a_selection(form, x, weight):
    selection = grail.Selection(torch.tensor(KEPT), H)
    assert torch.equal(grail.Selection(INDICES[form](), H).index, selection.index)
    expected = grail.fit(gram_of(x), selection, weight)
    assert torch.equal(grail.fit(gram_of(x), INDICES[form](), weight).weight, expected.weight)


@pytest.mark.parametrize("form", MASKS)
def test_a_mask_is_a_selection_in_ascending_order(form, x, weight):
    selection = grail.Selection(sorted(KEPT), H)
    assert torch.equal(grail.Selection(MASKS[form](), H).index, selection.index)
    expected = grail.fit(gram_of(x), selection, weight)
    assert torch.equal(grail.fit(gram_of(x), MASKS[form](), weight).weight, expected.weight)


@pytest.mark.parametrize("form", [form for form in INDICES if form != "int32"])
def test_absorb_takes_any_index(form, x, weight):
    gram = gram_of(x).matrix()
    expected = gk.absorb(weight, gram, torch.tensor(KEPT))
    assert torch.equal(gk.absorb(weight, gram, INDICES[form]()), expected)


def test_a_range_is_an_index(x, weight):
    found = grail.fit(gram_of(x), range(4), weight)
    assert torch.equal(found.weight, grail.fit(gram_of(x), [0, 1, 2, 3], weight).weight)
    matrix = gram_of(x).matrix()
    assert torch.equal(gk.absorb(weight, matrix, range(4)), gk.absorb(weight, matrix, [0, 1, 2, 3]))


def layer(kind: str, weight: torch.Tensor) -> Any:
    from transformers.pytorch_utils import Conv1D

    made: Any = {
        "linear": lambda: nn.Linear(H, O),
        "transformers": lambda: Conv1D(O, H),
        "conv1d": lambda: nn.Conv1d(H, O, 1),
        "conv2d": lambda: nn.Conv2d(H, O, 1, stride=2),
        "conv3d": lambda: nn.Conv3d(H, O, (1, 1, 1), bias=False),
    }[kind]()
    stored = weight.T if kind == "transformers" else weight
    made.weight = nn.Parameter(stored.reshape(made.weight.shape).clone())
    return made


@pytest.mark.parametrize("kind", ["linear", "transformers", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("kept", [KEPT, list(range(H))], ids=["some", "all"])
def test_a_layer_is_its_weight_and_gets_one_of_its_own_form(kind, kept, x, weight):
    consumer = layer(kind, weight)
    before = consumer.weight.detach().clone()
    found = grail.fit(gram_of(x), kept, consumer)
    assert torch.equal(consumer.weight, before)
    assert not found.weight.requires_grad
    narrow = grail.fit(gram_of(x), kept, weight).weight
    shape = list(before.shape)
    shape[0 if kind == "transformers" else 1] = len(kept)
    assert list(found.weight.shape) == shape
    as_matrix = found.weight.T if kind == "transformers" else found.weight.flatten(1)
    assert torch.equal(as_matrix, narrow)
    # It goes into the layer as it is, which then reads the narrow input.
    consumer.weight = nn.Parameter(found.weight)
    if kind in ("linear", "transformers"):
        y = x.flatten(0, 1)[:, kept]
        bias = consumer.bias
        consumer.nx = len(kept)
        torch.testing.assert_close(consumer(y), y @ narrow.T + bias)


def test_layers_and_tensors_can_be_given_together(x, weight):
    other = torch.randn(3, H)
    found = grail.fit(gram_of(x), KEPT, [layer("linear", weight), other, weight.numpy()])
    apart = [grail.fit(gram_of(x), KEPT, w).weight for w in (weight, other, weight)]
    for one, alone in zip(found.weights, apart, strict=True):
        torch.testing.assert_close(one, alone)


class Low(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return super().forward(x.relu())


@pytest.mark.parametrize(
    ("consumer", "message"),
    [
        (nn.Conv2d(H, O, 3), "one tap"),
        (nn.Conv2d(H, H, 1, groups=H), "groups"),
        (nn.Embedding(O, H), "a consumer is a Embedding, not a plain"),
        (Low(H, O), "a consumer is a Low, not a plain"),
        (nn.Sequential(nn.Linear(H, O)), "a consumer is a Sequential, not a plain"),
        (nn.Linear(H + 1, O), rf"\[O, {H}\]"),
    ],
)
def test_other_layers_are_refused(consumer, message, x):
    with pytest.raises(grail.GrailError, match=message):
        grail.fit(gram_of(x), KEPT, consumer)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("view", ["whole", "reversed", "read-only", "strided"])
def test_a_gram_takes_arrays(dtype, view, x):
    array = x.numpy().astype(dtype)
    array = {"reversed": array[::-1], "strided": array[:, ::2]}.get(view, array)
    array.flags.writeable = view != "read-only"
    mask = array[..., 0] > 0
    found, expected = grail.Gram(H), grail.Gram(H)
    found.update(array, mask, drift=array[..., :2])
    tensor = torch.tensor(array.copy())
    expected.update(tensor, torch.tensor(mask.copy()), drift=tensor[..., :2])
    assert found.tokens == expected.tokens == mask.sum()
    assert torch.equal(found.matrix(), expected.matrix())


def test_one_token_is_a_vector(x):
    gram = grail.Gram(H)
    gram.update(x[0, 0])
    assert gram.tokens == 1


SELECTORS: dict[str, Callable[[Any], Any]] = {
    "reduction": lambda view: view.width.best(view.gram.energy),
    "scores": lambda view: view.gram.energy,
    "scores of fp64": lambda view: view.gram.energy.double().numpy(),
    "scores in a list": lambda view: view.gram.energy.double().tolist(),
    "index": lambda view: view.width.best(view.gram.energy).index,
    "index in a list": lambda view: view.width.best(view.gram.energy).index.tolist(),
    "mask": lambda view: torch.zeros(view.width.channels, dtype=torch.bool).index_fill_(
        0, view.width.best(view.gram.energy).index, True
    ),
}


@pytest.mark.parametrize("form", SELECTORS)
@pytest.mark.parametrize("sites", ["mlp", "heads"])
def test_a_selector_may_give_scores_an_index_or_a_mask(form, sites, tiny_llama, tiny_batches):
    expected, model = tiny_llama(), tiny_llama()
    for network, name in ((expected, "reduction"), (model, form)):
        selector = SELECTORS[name]
        grail.compress(network, tiny_batches(), 0.5, sites, selector, progress=False)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda view: None, "got None"),
        (lambda view: "gram", "got str"),
        (lambda view: view, "got View"),
        (lambda view: view.gram.energy[:5], "score each of 80 channels"),
        (lambda view: view.consumer, "score each of 80 channels"),
        (lambda view: view.gram.energy * torch.nan, "NaN"),
        (lambda view: [0, 1], "40 of 80 channels must stay"),
        (lambda view: [0, 0, 1], "at most once"),
        (lambda view: torch.ones(7, dtype=torch.bool), "an entry for each of 80"),
    ],
)
def test_other_answers_of_a_selector_are_refused(answer, message, tiny_llama, tiny_batches):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(grail.GrailError, match=message):
        grail.compress(model, tiny_batches(), 0.5, selector=answer, progress=False)
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())


# How they print.


@pytest.mark.parametrize("several", [False, True])
def test_a_fit_and_a_gram_print_on_one_line(several, x, weight):
    gram = grail.Gram(H, name="layers.3.mlp")
    assert repr(gram) == f"Gram('layers.3.mlp', {H} channels, 0 tokens, on cpu)"
    gram.update(x)
    assert repr(gram) == f"Gram('layers.3.mlp', {H} channels, 120 tokens, on cpu)"
    found = grail.fit(gram, KEPT, [weight, weight[:2]] if several else weight, alpha=0.25)
    shapes = "[5, 3], [2, 3]" if several else "[5, 3]"
    errors = f"error {found.error:.4g}, plain {found.baseline_error:.4g}"
    assert repr(found) == f"Fit(weights {shapes}, {errors}, alpha 0.25)"
    assert repr(grail.fit(gram, KEPT, weight, compensate=False)).endswith("alpha inf)")


def test_reductions_print_their_widths():
    assert repr(grail.Selection(range(300), 1000)) == "Selection(300 of 1000 channels)"
    folding = grail.Folding([channel // 2 for channel in range(1000)])
    assert repr(folding) == "Folding(1000 channels into 500 clusters)"


def test_an_inspection_and_a_sensitivity_print_on_one_line(tiny_llama, tiny_batches):
    found = grail.inspect(tiny_llama(), tokens=32, sequence_length=16)
    assert repr(found).startswith("Inspection(LlamaForCausalLM")
    assert f"{found.parameters:,} parameters, 2 × heads, 2 × mlp, peak " in repr(found)
    measured = grail.sensitivity(tiny_llama(), tiny_batches(), 0.5, progress=False)
    losses = sorted(measured.losses.values())
    span = f"losses {losses[0]:.3g} to {losses[-1]:.3g}"
    assert repr(measured) == f"Sensitivity(keep 0.5, 2 sites, {span})"
    for printed in (repr(found), repr(measured), repr(measured.parts[0])):
        assert "tensor(" not in printed
        assert len(printed) < 200


# What is refused.

OBJECT = object()
ANY = [None, "text", 5, 2.5, OBJECT, {"a": 1}, nn.Linear(3, 3), grail.Gram(3), [OBJECT], int]
NOT_TENSORS = [value for value in ANY if value is not None]
NOT_SWITCHES = [None, "yes", 1, OBJECT, []]
NOT_PATHS = [None, 5, OBJECT, [], nn.Linear(3, 3)]
NOT_NUMBERS = ["text", OBJECT, [], True, nn.Linear(3, 3)]
NOT_COUNTS = [None, *NOT_NUMBERS, 2.5]
NOT_MODELS = [None, "text", 5, OBJECT, {"a": 1}, grail.Gram(3), nn.Linear, torch.ones(3)]
NOT_LANGUAGE_MODELS = [*NOT_MODELS, nn.Linear(3, 3)]
NOT_BATCHES = [None, 5, 2.5, OBJECT, "text", [None], [5], ["text"], [OBJECT], [[]], int]
NOT_TOKENS = [
    *NOT_BATCHES,
    [torch.ones(2, 9)],
    [torch.ones(9).long()],
    [{"input_ids": 5}],
]
NOT_DEVICES = [5.0, "nonsense", OBJECT, [], "cuda:99"]
NOT_VECTORS = [None, "text", 5, 2.5, OBJECT, {1, 2}, {"a": 1}, nn.Linear(3, 3), [OBJECT], ["a"]]
NOT_VECTORS += [[[1], [2, 3]], [2**70], np.array(["a"]), torch.eye(3)]

# The two objects of every verb.
OBJECTS = {"recipe": ["text", "nowhere.json", 5, OBJECT], "runtime": ["text", 5, OBJECT, int]}

# By name of function, and of its parameter, what it must refuse.
KERNEL_TARGETS = {"sums": NOT_TENSORS, "nonfinite": NOT_TENSORS, "backend": ANY}
WRONG: dict[str, dict[str, list[Any]]] = {
    "gk.absorb": {
        "weight": ANY,
        "gram": ANY,
        "keep": [*NOT_VECTORS, [2.5]],
        "backend": ANY,
        "drop": NOT_TENSORS,
        "dtype": [*NOT_TENSORS, torch.float16],
    },
    "gk.add_products": {"total": ANY, "left": ANY, "right": ANY},
    "gk.Products": {"total": ANY, "capacity": NOT_COUNTS},
    "gk.as_tensor": {"value": ANY},
    "gk.as_vector": {"values": [None, "text", 5, 2.5, OBJECT, {1, 2}, [OBJECT], ["a"]]},
    "gk.check_activations": {"x": [*ANY, torch.ones(4, H, dtype=torch.int64), torch.tensor(1.0)]},
    "gk.check_count": {"value": NOT_COUNTS},
    "gk.check_kind": {"value": NOT_TENSORS},
    "gk.choose_panel": {
        "schur": ANY,
        "products": ANY,
        "floor": ANY,
        "limits": ANY,
        "count": [*NOT_COUNTS, 0],
        "backend": ANY,
    },
    "gk.diagonal": {"packed": ANY, "channels": NOT_COUNTS},
    "gk.gather": {
        "packed": ANY,
        "channels": NOT_COUNTS,
        "rows": ANY,
        "columns": ANY,
        "dtype": [*ANY, torch.float16],
    },
    "gk.gram_": {
        "out": ANY, "x": ANY, "mask": NOT_TENSORS, "weights": NOT_TENSORS, **KERNEL_TARGETS
    },
    "gk.gram_batched_": {
        "out": ANY, "x": ANY, "mask": NOT_TENSORS, "weights": NOT_TENSORS, **KERNEL_TARGETS
    },
    "gk.gram_ragged_": {"out": ANY, "x": ANY, "offsets": ANY, **KERNEL_TARGETS},
    "gk.gram_swiglu_": {
        "out": ANY, "gate": ANY, "up": ANY, "mask": NOT_TENSORS, "weights": NOT_TENSORS,
        **KERNEL_TARGETS,
    },
    "gk.pack": {"matrix": ANY},
    "gk.packed_numel": {"channels": NOT_COUNTS},
    "gk.resolve_backend": {"x": ANY, "backend": ANY},
    "gk.unpack": {
        "packed": ANY, "channels": NOT_COUNTS, "out": NOT_TENSORS, "alpha": NOT_NUMBERS,
        "beta": NOT_NUMBERS,
    },
    "grail.Collected": {"folder": [*NOT_PATHS, "nowhere"]},
    "grail.Folding": {"labels": [*NOT_VECTORS, [True, False]]},
    "grail.Gram": {
        "channels": NOT_COUNTS, "device": NOT_DEVICES, "buffer": [*NOT_NUMBERS, -1, 2.5],
        "non_finite": ANY,
    },
    "grail.Gram.matrix": {"out": NOT_TENSORS},
    "grail.Gram.update": {
        "x": [*ANY, [[1.0] * H], np.array(["a"] * H), torch.ones(4, H, dtype=torch.int64),
              np.ones((4, H)), torch.ones(4, H + 1), torch.tensor(1.0), torch.ones(H + 1)],
        "mask": [*NOT_TENSORS, [True] * 4, torch.ones(3), np.ones(4)],
        "drift": [*NOT_TENSORS, [[1.0]] * 4], "target": [*NOT_TENSORS, [[1.0]] * 4],
        "samples": ["text", -1, 2.5, True, OBJECT],
    },
    "grail.Gram.of": {"module": [*NOT_MODELS, nn.ReLU()]},
    "grail.Gram.update_from": {
        "module": [*NOT_MODELS, nn.ReLU(), nn.Linear(H + 1, 2)], "inputs": [*ANY, ()],
        "mask": [*NOT_TENSORS, [True] * 4, torch.ones(3)],
    },
    "grail.Gram.hessian": {
        "per": ANY, "scale": NOT_NUMBERS, "out": [*NOT_TENSORS, torch.ones(3, 3)], "empty": ANY,
    },
    "grail.Gram.merge": {"other": [*ANY, torch.ones(3)]},
    "grail.Gram.save": {"path": NOT_PATHS},
    "grail.Gram.load": {"path": [*NOT_PATHS, "nowhere"], "device": NOT_DEVICES},
    "grail.Recipe": {
        "keep": [None, "half", True, 0, OBJECT, {"mlp": "x"}, torch.ones(3)],
        "sites": [5, OBJECT, [None], [5]], "selector": [None, 5, "nothing", [], OBJECT],
        "compensate": NOT_SWITCHES, "alpha": [None, "much", OBJECT, [], True],
        "toward": ANY, "fit_bias": NOT_SWITCHES,
        "drift_correction": [None, "much", OBJECT, [], True],
        "correct_attention": NOT_SWITCHES, "token_weights": [None, "yes", OBJECT, []],
        "closed_loop": NOT_SWITCHES, "seed": NOT_COUNTS, "per_tap": NOT_SWITCHES,
        "exact_folding": NOT_SWITCHES, "repair": NOT_SWITCHES, "non_finite": ANY,
        "quantize": ANY[1:], "refit_producers": NOT_COUNTS,
    },
    "grail.Selection": {"index": [*NOT_VECTORS, [0.5], [True, False]], "channels": NOT_COUNTS},
    "grail.Sensitivity.shares": {"keep": ["half", 2, OBJECT, True], "undone": [*NOT_NUMBERS, 1]},
    "grail.Fused": {
        "name": [None, 5, OBJECT, [5]], "parts": [None, 0, 1, -2, 2.5, "two", True, OBJECT],
        "interleaved": [None, 5, "yes", OBJECT],
    },
    "grail.Part": {
        "name": [None, 5, OBJECT, [5]], "ranges": [None, "text", 5, OBJECT, [5], [(0, 0)], []],
        "axis": ["one", 0.5, True, OBJECT],
    },
    "grail.Site": {
        "producers": [None, "text", 5, OBJECT, [5], [None], []],
        "consumers": [None, "text", 5, OBJECT, [5], [None], []], "along": [5, OBJECT, "text", [5]],
    },
    "grail.Runtime": {
        "storage": [None, *NOT_DEVICES], "onload": NOT_DEVICES, "resume_dir": [5, OBJECT, []],
        "progress": NOT_SWITCHES,
    },
    "grail.Pretrained": {
        "source": NOT_PATHS, "device": [None, 5, OBJECT], "trust_remote_code": NOT_SWITCHES,
        "dtype": [None, 5, "int8", OBJECT, torch.float32],
    },
    "grail.Text": {"source": [None, 5, OBJECT, ["text"]]},
    "grail.Mixture": {
        "texts": [None, 5, "text", OBJECT, [], [5], [None], [OBJECT], [["a", "b"]]],
        "shares": ["text", 0.5, OBJECT, [], [1], [0.5, "half"], [0.5, True], [0.5, 0.4], [2, -1],
                   [float("nan"), 1.0]],
        "tokens": ["text", 2.5, OBJECT, True], "sequence_length": ["text", 2.5, OBJECT, True],
        "batch_size": ["text", 2.5, OBJECT, True],
    },
    "grail.accumulate": {
        "model": NOT_MODELS, "layers": [5, OBJECT, [None], [], ["nowhere"], lambda *_: False],
        "share": NOT_SWITCHES, "device": NOT_DEVICES, "non_finite": ANY,
    },
    "grail.collect": {
        "model": NOT_MODELS, "batches": NOT_BATCHES, "sites": [5, OBJECT, [None], "nothing"],
        "output": NOT_PATHS, "per_tap": NOT_SWITCHES, "non_finite": ANY, "storage": NOT_DEVICES,
        "onload": NOT_DEVICES, **OBJECTS,
    },
    "grail.compress": {
        "model": NOT_MODELS, "batches": NOT_BATCHES, "keep": ["half", True, OBJECT],
        "sites": [5, OBJECT, [None], "nothing"], "selector": [5, "nothing", [], OBJECT],
        "multiple": ["text", 2.5, 0, OBJECT], "storage": NOT_DEVICES, "onload": NOT_DEVICES,
        "resume_dir": [5, OBJECT, []], "seed": NOT_COUNTS, "progress": NOT_SWITCHES, **OBJECTS,
        "guard": [value for value in NOT_BATCHES if value is not None],
        "select_on": [value for value in NOT_BATCHES if value is not None],
    },
    "grail.compress_checkpoint": {
        "source": [*NOT_PATHS, "nowhere"], "output": NOT_PATHS,
        "calibration": [None, 5, OBJECT, "nowhere.txt", [], [5], [["text"]],
                        ["nowhere.txt", "nowhere.json"]],
        "evaluate": [5, OBJECT, "nowhere.txt", [5], ["nowhere.txt"]], "baseline": NOT_SWITCHES,
        "uneven": NOT_SWITCHES, "guard": [5, OBJECT, "nowhere.txt"],
        "seed": NOT_COUNTS, **OBJECTS,
    },
    "grail.DenseReference": {"model": NOT_LANGUAGE_MODELS, "batches": NOT_TOKENS},
    "grail.evaluate": {
        "model": NOT_LANGUAGE_MODELS, "batches": NOT_TOKENS, "against": [5, "text", OBJECT],
    },
    "grail.export": {"model": NOT_LANGUAGE_MODELS, "tokenizer": ["text", 5], "output": NOT_PATHS,
                     "report": ["text", 5], "page": [5, OBJECT]},
    "grail.export_gguf": {
        "folder": NOT_PATHS, "output": NOT_PATHS, "like": NOT_PATHS[1:],
        "pad": [None, "32", 0, 48, True, 32.5], "dtype": [None, "float64", 16, torch.float32],
        "verify": NOT_SWITCHES,
    },
    "grail.export_imatrix": {
        "folder": NOT_PATHS, "output": NOT_PATHS, "calibration": [5, OBJECT, "nowhere.txt", []],
        "pad": [None, "32", 0, 48, True, 32.5], "device": [5, "nowhere", OBJECT],
        "progress": NOT_SWITCHES,
    },
    "grail.export_onnx": {
        "model": [value for value in NOT_MODELS if value != "text"], "output": NOT_PATHS,
        "example": ["text", 5, OBJECT, [], [OBJECT], {}, torch.ones(0, 6), torch.ones(2, 5)],
        "factory": ["text", 5, OBJECT, lambda: None], "verify": NOT_SWITCHES,
    },
    "grail.quantize": {
        "model": NOT_LANGUAGE_MODELS, "batches": NOT_BATCHES, "format": ANY,
        "runtime": OBJECTS["runtime"], "progress": NOT_SWITCHES, "non_finite": ANY,
    },
    "grail.fit": {
        "gram": [*[value for value in ANY if not isinstance(value, grail.Gram)], torch.eye(H)],
        "reduction": [*NOT_VECTORS, [0.5], [H], [-1], [True]],
        "weight": [*NOT_VECTORS, [], [None], torch.ones(H)],
        "alpha": [None, "much", True, []], "toward": ANY, "fit_bias": NOT_SWITCHES,
        "compensate": NOT_SWITCHES, "drift_correction": [None, "much", True, []],
        "held_out": ["text", 5, torch.eye(H), OBJECT], "guard": ["text", 5, torch.eye(H), OBJECT],
    },
    "grail.generate_calibration": {
        "source": [*NOT_PATHS, "nowhere"], "output": [*NOT_PATHS, "text.txt"],
        "prompts": [5, OBJECT, "nowhere.txt", [], [5]], "progress": NOT_SWITCHES,
        "tokens": [*NOT_COUNTS, 0], "temperature": [None, *NOT_NUMBERS, 0, -1.0, float("nan")],
        "top_p": [None, *NOT_NUMBERS, 0, 1.5, float("nan")], "prompt_tokens": [*NOT_COUNTS, 0],
        "sequence_length": [*NOT_NUMBERS, 1, 2.5, 10**6], "batch_size": [*NOT_COUNTS, 0],
        "seed": [*NOT_COUNTS, -1], "begin": [5, OBJECT, [], "no token"],
    },
    "grail.inspect": {
        "model": NOT_MODELS, **OBJECTS, "keep": [None, "half", True, OBJECT],
        "keeps": [5, [None], ["half"], OBJECT], "tokens": NOT_COUNTS, "batch_size": NOT_COUNTS,
        "sequence_length": NOT_COUNTS, "guard_tokens": NOT_COUNTS, "onload": NOT_DEVICES,
    },
    "grail.load": {"folder": [*NOT_PATHS, "nowhere"], "factory": [None, "text", 5, int, dict],
                   "device": NOT_DEVICES},
    "grail.load_model": {"source": NOT_PATHS, "device": NOT_DEVICES},
    "grail.measure_speed": {
        "files": [None, 5, "text", [], [5], [None], ["nowhere"]], "against": [5, OBJECT, "nowhere"],
        "prompt": NOT_COUNTS, "new": NOT_COUNTS, "rounds": [*NOT_COUNTS, 0], "threads": NOT_COUNTS,
        "batches": [None, 8, "1,8", [], [0], [1, 1], [2.5], OBJECT],
        "one_by_one": NOT_SWITCHES, "trust_remote_code": NOT_SWITCHES, "progress": NOT_SWITCHES,
    },
    "grail.merge": {"folders": [None, 5, "text", [], [5], ["nowhere"]], "output": NOT_PATHS},
    "grail.save": {"model": NOT_MODELS, "output": NOT_PATHS, "report": ["text", 5]},
    "grail.sensitivity": {
        "model": NOT_MODELS, "batches": NOT_BATCHES, "sites": [5, OBJECT, [None], "nothing"],
        "keep": ["half", 1, OBJECT, {"mlp": 0.5}], "selector": [5, "nothing", [], OBJECT],
        "probes": [0, "text", 2.5, OBJECT, 99], "seed": NOT_COUNTS, "non_finite": ANY,
        "guard": [value for value in NOT_BATCHES if value is not None],
        "resume_dir": [5, OBJECT, []], **OBJECTS,
    },
    "grail.token_batches": {
        "source": [None, 5, OBJECT, [5], [None], "nowhere.txt", "nowhere.jsonl"],
        "tokenizer": [None, "text", 5, OBJECT], "tokens": [*NOT_NUMBERS, 2.5, -1],
        "sequence_length": [*NOT_COUNTS, 0], "batch_size": [*NOT_COUNTS, 0],
        "seed": [*NOT_NUMBERS, 2.5],
    },
    "grail.trace": {"model": NOT_MODELS},
}  # fmt: skip
# Data that the package fills in; what takes any value, and a context that checks when entered.
RESULTS = {
    "gk.full_fp32",
    "gk.kind_of",
    "grail.Fit",
    "grail.Inspection",
    "grail.Report",
    "grail.Sensitivity",
}
CASES = [
    pytest.param(name, parameter, value, id=f"{name}({parameter}={type(value).__name__}-{number})")
    for name, parameters in WRONG.items()
    for parameter, values in parameters.items()
    for number, value in enumerate(values)
]


def of_kernels() -> dict[str, Callable[[], dict[str, Any]]]:
    """The same for the functions of grail_kernels."""
    packed, activations = torch.zeros(gk.packed_numel(H)), torch.ones(2, 4, H)
    return {
        "gk.absorb": lambda: {"weight": torch.ones(O, H), "gram": torch.eye(H), "keep": [1, 2]},
        "gk.add_products": lambda: {
            "total": torch.zeros(3, H),
            "left": activations[0, :, :3],
            "right": activations[0],
        },
        "gk.Products": lambda: {"total": torch.zeros(3, H), "capacity": 8},
        "gk.as_tensor": lambda: {"name": "x", "value": np.ones(3)},
        "gk.as_vector": lambda: {"name": "x", "values": [1, 2]},
        "gk.check_activations": lambda: {"name": "x", "x": activations},
        "gk.check_count": lambda: {"name": "x", "value": 3},
        "gk.check_kind": lambda: {
            "name": "x",
            "value": activations,
            "kinds": torch.Tensor,
            "wanted": "a tensor",
        },
        "gk.choose_panel": lambda: {
            "schur": torch.eye(3)[None],
            "products": torch.eye(3)[None],
            "floor": torch.zeros(1, 3),
            "limits": torch.tensor([2]),
            "count": 2,
        },
        "gk.diagonal": lambda: {"packed": packed, "channels": H},
        "gk.gather": lambda: {
            "packed": packed,
            "channels": H,
            "rows": torch.tensor([1]),
            "columns": torch.tensor([0, 2]),
        },
        "gk.gram_": lambda: {"out": packed, "x": activations},
        "gk.gram_batched_": lambda: {"out": packed.repeat(2, 1), "x": activations},
        "gk.gram_ragged_": lambda: {
            "out": packed.repeat(2, 1),
            "x": activations[0],
            "offsets": torch.tensor([0, 2, 4]),
        },
        "gk.gram_swiglu_": lambda: {"out": packed, "gate": activations, "up": activations},
        "gk.pack": lambda: {"matrix": torch.eye(H)},
        "gk.packed_numel": lambda: {"channels": H},
        "gk.resolve_backend": lambda: {"x": activations},
        "gk.unpack": lambda: {"packed": packed, "channels": H},
    }


# Of a measurement of speed.
LITTLE = {"prompt": 4, "new": 2, "batches": [1], "rounds": 1, "progress": False}


# Of a model whose rows are whole blocks of 32 weights.
IN_BLOCKS = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
}


def of_data() -> dict[str, Callable[[], dict[str, Any]]]:
    """Arguments of classes that hold data, by their name."""
    return {
        "grail.Folding": lambda: {"labels": [0, 1, 0]},
        "grail.Recipe": dict,
        "grail.Runtime": dict,
        "grail.Pretrained": lambda: {"source": "anywhere"},
        "grail.Text": lambda: {"source": "anywhere"},
        "grail.Mixture": lambda: {"texts": ["anywhere", "elsewhere"]},
        "grail.Selection": lambda: {"index": [0, 2], "channels": 3},
        "grail.Sensitivity.shares": lambda: {"self": grail.Sensitivity(0.5, ())},
        "grail.Fused": lambda: {"name": "0"},
        "grail.Part": lambda: {"name": "0", "ranges": [(0, 2)]},
        "grail.Site": lambda: {"producers": ["0"], "consumers": ["2"]},
    }


@pytest.fixture(scope="module")
def valid(tiny_llama, tiny_batches, tiny_tokenizer, tmp_path_factory) -> Callable[[str], dict]:
    """Arguments with which a function works, by its name."""
    folder = tmp_path_factory.mktemp("valid")
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    grail.save(network, folder / "saved")
    gram, numbers = gram_of(torch.ones(4, H)), itertools.count()
    gram.save(folder / "gram.state")
    grail.collect(tiny_llama(), tiny_batches(), output=folder / "collected", progress=False)
    text = folder / "text.txt"
    text.write_text("w3 w4 w5 " * 60)
    calibration = {"batches": tiny_batches(), "progress": False}
    of_text = {
        "calibration": grail.Text(str(text), tokens=64, sequence_length=16),
        "progress": False,
    }
    sample = torch.ones(2, 6)

    def new() -> Any:
        return folder / f"new{next(numbers)}"

    def model_folder() -> Any:
        tiny_llama().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        return folder / "model"

    def gguf_folder() -> dict[str, Any]:
        model = model_folder()
        like = dense_file(tiny_llama(), folder / f"dense{next(numbers)}.gguf")
        return {"folder": model, "output": new(), "like": like}

    makers: dict[str, Callable[[], dict[str, Any]]] = {
        **of_kernels(),
        **of_data(),
        "grail.Collected": lambda: {"folder": folder / "collected"},
        "grail.Gram": lambda: {"channels": H},
        "grail.Gram.matrix": lambda: {"self": gram},
        "grail.Gram.update": lambda: {"self": grail.Gram(H), "x": torch.ones(4, H)},
        "grail.Gram.of": lambda: {"module": nn.Linear(H, 2)},
        "grail.Gram.update_from": lambda: {
            "self": grail.Gram(H),
            "module": nn.Linear(H, 2),
            "inputs": torch.ones(4, H),
        },
        "grail.Gram.hessian": lambda: {"self": gram},
        "grail.accumulate": lambda: {"model": network},
        "grail.Gram.merge": lambda: {"self": grail.Gram(H), "other": gram},
        "grail.Gram.save": lambda: {"self": gram, "path": folder / "gram.state"},
        "grail.Gram.load": lambda: {"path": folder / "gram.state"},
        "grail.collect": lambda: {"model": tiny_llama(), **calibration, "output": new()},
        "grail.compress": lambda: {"model": tiny_llama(), **calibration},
        "grail.compress_checkpoint": lambda: {"source": model_folder(), "output": new(), **of_text},
        "grail.DenseReference": lambda: {"model": tiny_llama(), **calibration},
        "grail.evaluate": lambda: {"model": tiny_llama(), **calibration},
        "grail.export": lambda: {"model": tiny_llama(), "tokenizer": None, "output": new()},
        "grail.export_gguf": gguf_folder,
        "grail.export_imatrix": lambda: {"folder": model_folder(), "output": new(), **of_text},
        "grail.export_onnx": lambda: {"model": network, "output": new(), "example": sample},
        "grail.fit": lambda: {"gram": gram, "reduction": [0, 2], "weight": torch.ones(O, H)},
        "grail.generate_calibration": lambda: {
            "source": model_folder(),
            "output": folder / f"new{next(numbers)}.jsonl",
            "tokens": 16,
            "sequence_length": 16,
            "progress": False,
        },
        "grail.inspect": lambda: {"model": tiny_llama(), "tokens": 32, "sequence_length": 16},
        "grail.load": lambda: {"folder": folder / "saved", "factory": lambda: network},
        "grail.load_model": lambda: {"source": model_folder()},
        "grail.measure_speed": lambda: {"files": [model_folder()], **LITTLE},
        "grail.merge": lambda: {"folders": [folder / "collected"], "output": new()},
        "grail.quantize": lambda: {"model": tiny_llama(**IN_BLOCKS), **calibration},
        "grail.save": lambda: {"model": network, "output": new()},
        "grail.sensitivity": lambda: {"model": tiny_llama(), **calibration},
        "grail.token_batches": lambda: {
            "source": ["w3 w4 " * 50],
            "tokenizer": tiny_tokenizer(),
            "tokens": 8,
            "sequence_length": 8,
        },
        "grail.trace": lambda: {"model": network},
    }
    return lambda name: makers[name]()


NUMBERS = {
    "keep": (0.5, np.float32(0.5)),
    "alpha": (0.25, np.float16(0.25)),
    "drift_correction": (1, np.int32(1)),
    "multiple": (4, np.int64(4)),
    "seed": (7, np.uint8(7)),
}


def perceptron() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, H), nn.ReLU(), nn.Linear(H, O))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=draw)
    return model


def compressed(batches: Any = None, **settings: Any) -> grail.Report:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(13, 5, generator=draw)] if batches is None else batches
    settings = {"keep": 0.5, "selector": "random", "progress": False, **settings}
    return grail.compress(perceptron(), batches, sites=[grail.Site(["0"], ["2"])], **settings)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_are_numbers(name):
    expected, found = (compressed(**{name: number}) for number in NUMBERS[name])
    assert found.settings == expected.settings
    assert json.dumps(found.settings) == json.dumps(expected.settings)
    assert found.sites == expected.sites


def test_numbers_of_numpy_are_numbers_of_a_fit_and_a_gram(x, weight):
    gram = grail.Gram(np.int64(H), buffer=np.int32(16))
    gram.update(x)
    assert (type(gram.channels), gram.channels) == (int, H)
    found = grail.fit(gram, KEPT, weight, alpha=np.float32(0.25))
    assert torch.equal(found.weight, grail.fit(gram, KEPT, weight, alpha=0.25).weight)


@pytest.mark.parametrize(
    "keep", ["half", [0.5, 0.6], {"named": "half"}, True, np.array([0.5, 0.6])]
)
def test_a_keep_of_another_kind_is_refused_whole(keep):
    found = keep["named"] if isinstance(keep, dict) else keep
    found = found.tolist() if isinstance(found, np.ndarray) else found
    with pytest.raises(InputError, match=re.escape(f"got {found!r}")):
        compressed(keep=keep)


@pytest.mark.parametrize("seed", [2**63, 2**64 + 1])
def test_a_seed_that_torch_does_not_take_is_refused(seed):
    with pytest.raises(InputError, match="seed must be less than"):
        compressed(seed=seed)
    compressed(seed=2**63 - 1)


BATCHES: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "sparse": (lambda x: x.to_sparse(), "must be a dense"),
    "compressed rows": (lambda x: x.to_sparse_csr(), "must be a dense"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "must be a dense"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "must be a dense",
    ),
    "meta": (lambda x: x.to("meta"), "holds? no values"),
}


@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*beta")
@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("several", [False, True])
def test_tensors_that_are_not_dense_are_refused(form, several, x, weight):
    make, message = BATCHES[form]
    batch = make(torch.randn(13, 5))
    with pytest.raises(InputError, match=message):
        compressed([(batch,) if several else batch] * 2)
    with pytest.raises(InputError, match=message):
        grail.Gram(H).update(make(x[0]))
    with pytest.raises(InputError, match=message):
        grail.fit(gram_of(x), KEPT, [weight, make(weight)] if several else make(weight))


@pytest.mark.parametrize("shape", [(5,), ()])
def test_batches_without_an_axis_of_samples_are_refused(shape):
    with pytest.raises(InputError, match="samples along the first axis"):
        compressed([torch.randn(shape) for _ in range(6)])


def test_weights_that_cannot_be_fitted_are_refused(x, weight):
    with pytest.raises(InputError, match="at least 1 output"):
        grail.fit(gram_of(x), KEPT, weight[:0])
    with pytest.raises(InputError, match="dequantise it"):
        grail.fit(gram_of(x), KEPT, weight.to(torch.float8_e4m3fn))


def function(name: str) -> Callable[..., Any]:
    found: Any = {"gk": gk, "grail": grail}[name.split(".")[0]]
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def test_every_public_function_has_its_wrong_arguments():
    for prefix, module in (("gk", gk), ("grail", grail)):
        for name in module.__all__:
            found = getattr(module, name)
            raised = isinstance(found, type) and issubclass(found, Exception)
            if (
                raised
                or name.isupper()
                or f"{prefix}.{name}" in RESULTS
                or inspect.isabstract(found)
            ):
                continue
            assert f"{prefix}.{name}" in WRONG


@pytest.mark.parametrize("name", WRONG)
def test_what_stands_for_right_arguments_is_right(name, valid):
    if name == "grail.export_onnx":
        pytest.importorskip("onnxscript")
    if name != "grail.Sensitivity.shares":  # one without any site: no share is left to give
        function(name)(**valid(name))


@pytest.mark.parametrize(("name", "parameter", "value"), CASES)
def test_a_wrong_kind_of_argument_is_refused_by_name(name, parameter, value, valid):
    with pytest.raises(grail.GrailError) as caught:
        function(name)(**{**valid(name), parameter: value})
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert "object has no attribute" not in message
