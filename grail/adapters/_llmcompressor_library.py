"""The parts of llm-compressor that its adapters attach to; a missing one is refused here."""

from typing import Any

from grail.adapters._library import Library

LIBRARY = Library("llmcompressor", ("0.14.0.1",))


def _attached(module: str, name: str) -> Any:
    return LIBRARY.attribute(LIBRARY.module(module), name)


logger = _attached("loguru", "logger")
PrivateAttr = _attached("pydantic", "PrivateAttr")

# Modifiers and their recipes.
Modifier = _attached("llmcompressor.modifiers", "Modifier")
GPTQ = _attached("llmcompressor.modifiers.gptq", "GPTQModifier")
QuantizationMixin = _attached("llmcompressor.modifiers.quantization", "QuantizationMixin")
Recipe = _attached("llmcompressor.recipe", "Recipe")
factory = _attached("llmcompressor.modifiers", "ModifierFactory")

# GPTQ on a list of modules; each batch of it has one shape.
assign_batches = _attached("llmcompressor.modifiers.gptq.helpers", "assign_batches")

# A session of its own, and the pipeline that calibrates block by block.
active_session = _attached("llmcompressor.core", "active_session")
create_session = _attached("llmcompressor.core", "create_session")
CalibrationPipeline = _attached("llmcompressor.pipelines", "CalibrationPipeline")
DatasetArguments = _attached("llmcompressor.args", "DatasetArguments")

# Experts of a mixture, as oneshot makes them.
LinearExperts2D = _attached("llmcompressor.modeling.moe.linear_experts", "LinearExperts2D")

# Modules whose weights wait on another device, and those that have a scheme of quantisation.
OffloadCache = _attached("compressed_tensors.offload.cache", "OffloadCache")
remove_module_offload = _attached("compressed_tensors.offload.module", "remove_module_offload")
get_execution_device = _attached("compressed_tensors.offload", "get_execution_device")
is_distributed = _attached("compressed_tensors.offload", "is_distributed")
is_source_process = _attached("compressed_tensors.distributed", "is_source_process")
is_module_quantized = _attached("compressed_tensors.quantization.utils", "is_module_quantized")
match_named_modules = _attached("compressed_tensors.utils", "match_named_modules")
get_main_device = _attached("llmcompressor.utils.dev", "get_main_device")
