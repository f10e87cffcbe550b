"""Triton kernels and their torch twins for Gram matrices. Knows tensors, no models."""

from grail_kernels._absorb import absorb
from grail_kernels._gather import gather
from grail_kernels.arguments import as_tensor, as_vector, check_count, check_kind, kind_of
from grail_kernels.backend import resolve_backend
from grail_kernels.checks import ACTIVATION_DTYPES, check_activations
from grail_kernels.errors import BackendError, GrailError, InputError
from grail_kernels.gram import gram_, gram_batched_, gram_ragged_, gram_swiglu_
from grail_kernels.operators import OPERATOR_FUNCTIONS
from grail_kernels.panel import choose_panel
from grail_kernels.precision import full_fp32
from grail_kernels.products import Products, add_products
from grail_kernels.readout import unpack
from grail_kernels.tiles import STRIP_ROWS, diagonal, pack, packed_numel
from grail_kernels.tuning import BUFFER_TOKENS

__all__ = [
    "ACTIVATION_DTYPES",
    "BUFFER_TOKENS",
    "OPERATOR_FUNCTIONS",
    "STRIP_ROWS",
    "BackendError",
    "GrailError",
    "InputError",
    "Products",
    "absorb",
    "add_products",
    "as_tensor",
    "as_vector",
    "check_activations",
    "check_count",
    "check_kind",
    "choose_panel",
    "diagonal",
    "full_fp32",
    "gather",
    "gram_",
    "gram_batched_",
    "gram_ragged_",
    "gram_swiglu_",
    "kind_of",
    "pack",
    "packed_numel",
    "resolve_backend",
    "unpack",
]
