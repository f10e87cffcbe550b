"""The small CLIP: its captions, and that a class's logit is the mean over them."""

import pytest
import torch

pytest.importorskip("transformers")

from bench.quality import captions


def test_captions_differ_and_end_where_the_text_tower_looks():
    tokens = captions.tokens()
    ids = tokens["input_ids"]
    assert ids.shape[0] == len(captions.CLASSES) * len(captions.TEMPLATES)
    assert len({tuple(row.tolist()) for row in ids}) == len(ids)
    config = captions.new_clip().config.text_config
    assert ids.max() == config.eos_token_id == config.vocab_size - 1
    assert (ids == config.eos_token_id).sum(1).eq(1).all()
    lengths = tokens["attention_mask"].sum(1)
    assert all(row[n - 1] == config.eos_token_id for row, n in zip(ids, lengths, strict=True))
    assert ids.shape[1] <= config.max_position_embeddings


def test_a_class_is_scored_by_the_mean_cosine_to_its_captions():
    torch.manual_seed(0)
    clip = captions.new_clip().eval()
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        logits = captions.Captioned(clip).eval()(images)
        each = clip(pixel_values=images, **captions.tokens())
        cosines = each.image_embeds.double() @ each.text_embeds.double().T
        scale = clip.logit_scale.double().exp()
    templates = len(captions.TEMPLATES)
    for index in range(len(captions.CLASSES)):
        mean = scale * cosines[:, index * templates : (index + 1) * templates].mean(1)
        torch.testing.assert_close(logits[:, index].double(), mean, rtol=1e-4, atol=1e-5)
