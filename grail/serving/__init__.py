"""Compressed models as files of runtimes, each compared with its folder in the runtime itself."""

__all__ = [
    "gguf_check",
    "gguf_writing",
    "imatrix",
    "onnx_check",
    "onnx_writing",
    "speed",
    "vllm_check",
]
