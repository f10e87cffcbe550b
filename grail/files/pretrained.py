"""`Pretrained`: the name of a model, with the settings of loading it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from grail.arguments import require_usable
from grail.errors import InputError
from grail.files.load import load_model
from grail.runtime.settings import documented, setting
from grail_kernels import check_kind

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@documented
@dataclass(frozen=True)
class Pretrained:
    """A causal language model of transformers and its tokenizer, not loaded yet."""

    source: str = setting(
        ..., "A folder that save_pretrained wrote, a hub name, or a .gguf file.", flag="MODEL"
    )
    device: str = setting(
        "auto",
        "Device that runs the model: cpu, cuda, cuda:1; auto is a GPU if there is one.",
        panel="Running",
    )
    dtype: Dtype = setting(
        "auto", "Dtype of the weights; auto is that of the checkpoint.", panel="Running"
    )
    trust_remote_code: bool = setting(
        False,
        "Run the Python code that comes with MODEL, with all your rights: read it first.",
        flag="--trust-remote-code",
        panel="Running",
    )

    def __post_init__(self) -> None:
        check_kind("source", self.source, str, "a folder, a hub name or a file")
        check_kind("device", self.device, str, "the name of a device, such as 'cuda'")
        check_kind("trust_remote_code", self.trust_remote_code, bool, "True or False")
        if self.dtype not in get_args(Dtype):
            raise InputError(
                f"dtype must be one of {', '.join(get_args(Dtype))}; got {self.dtype!r}"
            )

    @property
    def name(self) -> str:
        """The source without the folders before it."""
        return Path(self.source).absolute().name

    @property
    def computing(self) -> str:
        """The device of that name in any case, or one that is here for "auto".

        Raises:
            InputError: a device that cannot be used here.
        """
        device = self.device.lower()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        require_usable(device)
        return device

    def load(self, device: str | None = None) -> tuple[Any, Any]:
        """Returns model and tokenizer, the model on a device, default where it computes."""
        return load_model(
            self.source,
            dtype=None if self.dtype == "auto" else getattr(torch, self.dtype),
            device=self.computing if device is None else device,
            trust_remote_code=self.trust_remote_code,
        )
