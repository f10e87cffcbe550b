"""Triton kernels and their torch twins for Gram matrices. Knows tensors, no models."""

from grail_kernels.absorb import absorb
from grail_kernels.backend import resolve_backend
from grail_kernels.errors import BackendError, GrailError, InputError
from grail_kernels.gram import gram_
from grail_kernels.gram_batched import gram_batched_
from grail_kernels.gram_ragged import gram_ragged_
from grail_kernels.gram_swiglu import gram_swiglu_
from grail_kernels.tiles import diagonal, pack, packed_numel, unpack

__all__ = [
    "BackendError",
    "GrailError",
    "InputError",
    "absorb",
    "diagonal",
    "gram_",
    "gram_batched_",
    "gram_ragged_",
    "gram_swiglu_",
    "pack",
    "packed_numel",
    "resolve_backend",
    "unpack",
]
