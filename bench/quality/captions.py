"""A small CLIP that reads Fashion-MNIST and captions of its ten classes.

No package ships the weights of a CLIP, so `python -m bench.quality.train clip` trains this one:
two towers of transformers' CLIPModel, contrasted over the captions of all classes.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.quality.networks import WEIGHTS

if TYPE_CHECKING:
    from transformers import CLIPModel

# Of Fashion-MNIST, in the order of its labels.
CLASSES = (
    *("t-shirt or top", "pair of trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
TEMPLATES = ("a photo of a {}", "a small grey picture of a {}", "one {} on black", "the {} we sell")
CAPTIONS = tuple(template.format(name) for name in CLASSES for template in TEMPLATES)
_PAD, _BEGIN = 0, 1
_WORDS = {word: 2 + i for i, word in enumerate(sorted({w for c in CAPTIONS for w in c.split()}))}
_END = 2 + len(_WORDS)  # the highest id, where the text tower looks for the caption's embedding


def tokens() -> dict[str, Tensor]:
    """Word ids and mask [classes · templates, length] of all captions, class by class."""
    rows = [[_BEGIN, *(_WORDS[word] for word in caption.split()), _END] for caption in CAPTIONS]
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[_PAD] * (length - len(row))] for row in rows], dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": (ids != _PAD).long()}


def new_clip() -> "CLIPModel":
    """The untrained network of `clip_fashion`: 16 patches, 4 layers of 64, MLP 256; 2 for words."""
    from transformers import CLIPConfig, CLIPModel

    # The usual deviation of weights is for networks eight times as wide.
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    sizes |= {"projection_dim": 64, "initializer_factor": 3.0}
    images = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_hidden_layers": 4}
    words = {"vocab_size": _END + 1, "max_position_embeddings": 16, "num_hidden_layers": 2}
    ends = {"pad_token_id": _PAD, "bos_token_id": _BEGIN, "eos_token_id": _END}
    return CLIPModel(
        CLIPConfig(
            vision_config={**sizes, **images},
            text_config={**sizes, **words, **ends},
            projection_dim=64,
        )
    )


def clip_fashion() -> "CLIPModel":
    """The CLIP trained on Fashion-MNIST's captions, in fp32 and evaluation mode."""
    from transformers import CLIPModel

    folder = WEIGHTS / "clip_fashion"
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


class Captioned(nn.Module):
    """A CLIP as a classifier: images [N, 1, 28, 28] → logits [N, 10], of captions they are like.

    A class's logit is the mean over its captions: the prompt ensemble of Radford et al. 2021
    (arXiv 2103.00020).
    """

    def __init__(self, clip: "CLIPModel") -> None:
        super().__init__()
        self.clip = clip
        for name, value in tokens().items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        captions = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        logits = self.clip(pixel_values=images, **captions).logits_per_image
        return logits.unflatten(1, (len(CLASSES), len(TEMPLATES))).mean(-1)
