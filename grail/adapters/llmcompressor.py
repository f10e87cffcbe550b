"""llm-compressor's `oneshot` with GRAIL: its GPTQ on GRAIL's Grams, and pruning before it.

    from grail.adapters.llmcompressor import GPTQModifier, GrailModifier
    quantise = GPTQModifier(scheme="W4A16", targets="Linear", ignore=["lm_head"])
    recipe = [GrailModifier(keep=0.75, multiple=128), quantise]
    oneshot(model=model, dataset=dataset, recipe=recipe)

Tested with llm-compressor 0.14.0.1. In its YAML recipes the names are `GrailGPTQModifier` and
`GrailModifier`, once this module is imported; `GPTQModifier` stays llm-compressor's own there.
"""

from grail.adapters._llmcompressor_gptq import GPTQModifier
from grail.adapters._llmcompressor_library import factory
from grail.adapters._llmcompressor_prune import GrailModifier

__all__ = ["GPTQModifier", "GrailModifier"]

factory.register("GrailGPTQModifier", GPTQModifier)
factory.register("GrailModifier", GrailModifier)
