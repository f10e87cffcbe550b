import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from grail.files.alignment import align_file, align_weights


@pytest.mark.parametrize("name", ["a", "ab", "abc" * 9, "x" * 61], ids=len)
@pytest.mark.parametrize("metadata", [None, {"format": "pt", "note": "é" * 7}])
def test_a_padded_file_holds_the_same_at_aligned_addresses(name, metadata, tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = {name: torch.randn(32, 16), "last": torch.randn(3)}
    save_file(tensors, path, metadata=metadata)
    align_file(path)
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0
    once = path.read_bytes()
    align_file(path)
    assert path.read_bytes() == once
    found = load_file(path)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert (file.metadata() or None) == metadata
    assert list(tmp_path.iterdir()) == [path]


def test_parameters_at_odd_addresses_are_moved():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    memory = torch.zeros(200)
    for number, parameter in enumerate(model.parameters()):
        place = memory[40 * number + 1 :][: parameter.numel()].view_as(parameter)
        parameter.data = place.copy_(parameter.data)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert any(parameter.data_ptr() % 64 for parameter in model.parameters())
    objects = list(model.parameters())
    align_weights(model)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert all(map(torch.equal, model.parameters(), before))
