"""Tiny random models: small sizes by the name of a setting, and a tokenizer of words.

The page of families and the tests use the same sizes. They differ from one another, so that one
cannot stand for another.
"""

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 97
# The names of a size in transformers, by size.
_NAMES: dict[Any, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    48: "hidden_size d_model n_embd dim conv_dim embedding_size word_embed_proj_dim",
    80: """intermediate_size dff ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size
        n_inner intermediate_size_mlp""",
    16: "moe_intermediate_size mamba_d_head mamba_head_dim",
    32: "expert_ffn_hidden_size",
    24: """shared_expert_intermediate_size moe_shared_expert_intermediate_size
        shared_intermediate_size""",
    2: """num_hidden_layers n_layer n_layers decoder_layers encoder_layers num_layers
        num_experts_per_tok num_experts_per_token moe_k moe_topk linear_num_key_heads
        pad_token_id eos_token_id""",
    6: """num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads
        num_heads linear_num_heads mamba_n_heads mamba_num_heads""",
    3: "num_key_value_heads",
    8: """head_dim kv_channels global_head_dim swa_head_dim qk_rope_head_dim sliding_window
        mamba_d_state linear_head_dim linear_key_head_dim linear_value_head_dim""",
    12: "v_head_dim qk_nope_head_dim",
    20: "q_lora_rank kv_lora_rank",
    4: """num_experts num_local_experts n_routed_experts moe_num_experts
        linear_num_value_heads""",
    1: """n_group topk_group first_k_dense_replace num_dense_layers mamba_n_groups
        bos_token_id""",
    128: "max_position_embeddings n_positions",
    96: "mamba_d_ssm",
    0: "hidden_size_per_layer_input num_kv_shared_layers",
    0.1: "initializer_range init_std",
}
SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}


def randomised(make: Callable[[], Any], seed: int, fill: bool = False) -> Any:
    """The fp32 model of `make`, in evaluation mode, the same for the same seed.

    Norms and biases are moved away from one and zero, so that every part shows in the logits;
    with `fill`, matrices of zeros too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                elif fill and float(parameter.std()) == 0:
                    parameter.copy_(torch.randn_like(parameter) / 10)
    return model.float().eval()


def tokenizer() -> Any:
    """A tokenizer of words: token i (3 ≤ i < 97) is the word "w<i>", any other word is 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, VOCABULARY))]
    vocabulary = {word: index for index, word in enumerate(words)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def language_model(seed: int = 0) -> tuple[Any, Any]:
    """A random Llama of two blocks, and a tokenizer of bytes with a template for chats.

    It loads in no time and reads any text; what it writes has no meaning.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    words = byte_tokenizer()
    own = {name: words.convert_tokens_to_ids(token) for name, token in _SPECIAL.items()}
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=48,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        initializer_range=0.1,
        **{f"{name}_id": number for name, number in own.items()},
    )
    return randomised(lambda: AutoModelForCausalLM.from_config(config), seed), words


_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> Any:
    """A tokenizer of the 256 bytes and three special tokens, with a template for chats."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*_SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=_CHAT, **_SPECIAL)
