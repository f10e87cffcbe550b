"""Token ids that a model's embedding has no row for are refused before the model runs."""

import pytest
import torch
from torch import nn

import grail
from grail.calibrate.embedding import check_token_ids
from grail.errors import InputError


@pytest.mark.parametrize("bad", [97, 98, 5000, -1])
@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "int32"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def test_ids_beyond_the_embedding_are_refused(tiny_model, family, form, bad):
    tokens = torch.full((3, 7), 96)
    model = tiny_model(family)
    made = {
        "tensor": lambda: tokens,
        "tuple": lambda: (tokens,),
        "mapping": lambda: {"input_ids": tokens, "attention_mask": torch.ones(3, 7)},
        "int32": lambda: tokens.int(),
    }
    check_token_ids(model, made[form]())
    tokens[1, 4] = bad
    with pytest.raises(InputError, match=rf"embedding of 97 rows does not have: {bad};"):
        check_token_ids(model, made[form]())


def test_the_message_names_tokens_and_the_tokenizer(tiny_llama, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(6)])
    tokens = torch.arange(97, 103)[None]
    with pytest.raises(InputError, match=r"tokenizer of 103 tokens.*'<extra 0>'.*and 2 more"):
        check_token_ids(tiny_llama(), tokens, tokenizer)


@pytest.mark.parametrize(
    "batch", [torch.randn(2, 3, 4, 4), torch.full((2, 3), 900), {"pixel_values": torch.ones(2)}]
)
def test_other_networks_take_any_batch(batch):
    check_token_ids(nn.Linear(3, 3), batch)


def test_evaluation_refuses_them_too(tiny_llama):
    batches = [torch.tensor([[5, 6]]), torch.tensor([[5, 97]])]
    with pytest.raises(InputError, match="embedding of 97 rows"):
        grail.evaluate(tiny_llama(), batches, progress=False)


def test_numbers_by_another_name_are_no_token_ids(tiny_llama):
    check_token_ids(tiny_llama(), {"labels": torch.full((2, 3), 900)})
