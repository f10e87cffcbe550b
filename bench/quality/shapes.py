"""Shapes of published language models, by the names of transformers."""


def llama(hidden: int, inner: int, blocks: int, heads: int, groups: int) -> dict[str, int]:
    """Hidden and intermediate size, blocks, query heads and KV heads of a configuration."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


# Widths from the models' published configurations.
LLAMAS = {
    "smollm2-135m": llama(576, 1536, 30, 9, 3),
    "llama-2-7b": llama(4096, 11008, 32, 32, 32),
    "llama-2-70b": llama(8192, 28672, 80, 64, 8),
}
MIXTRAL = llama(6144, 16384, 56, 48, 8) | {"num_local_experts": 8, "num_experts_per_tok": 2}
