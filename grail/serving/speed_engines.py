"""Runtimes as the worker measures them: each loads a file, and does a round's work at a batch size.

Modules are imported by the engine that needs them: beside llama.cpp there is no torch.
"""

import importlib
import inspect
import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

Phases = dict[str, tuple[float, float]]  # wall and CPU seconds


class Refused(Exception):  # noqa: N818 - an answer to the user
    """A file, or a size of the work, that cannot be measured; the text is a sentence."""


class Explained(Exception):  # noqa: N818 - as above
    """A failure that the runtime has explained on standard error."""


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Does some work; returns wall seconds, and CPU seconds of all threads of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def tokens_of(vocabulary: int, batch: int, length: int) -> np.ndarray:
    """Returns tokens [batch, length], the same ones for each model of a vocabulary."""
    return np.random.default_rng(0).integers(vocabulary, size=(batch, length))


def require_positions(source: str, most: int | None, prompt: int, new: int) -> None:
    """Raises Refused for sequences longer than a model reads."""
    if most is not None and prompt + new > most:
        raise Refused(
            f"{source} reads sequences of at most {most} tokens, and prompt and new tokens are "
            f"{prompt + new}; lower --prompt or --new"
        )


class Transformers:
    """A language model in transformers, in the dtype of its weights."""

    def __init__(
        self,
        source: str,
        *,
        prompt: int,
        new: int,
        threads: int,
        trust_remote_code: bool = False,
        **_: Any,
    ):
        import torch

        from grail.files.load import load_model, positions

        torch.set_num_threads(threads)
        self._prompt, self._new = prompt, new
        model, _tokenizer = load_model(source, trust_remote_code=trust_remote_code)
        require_positions(source, positions(model), prompt, new)
        self._model, self._source = model, source
        self.runtime = f"transformers {metadata.version('transformers')}"
        self.form = str(model.dtype).removeprefix("torch.")
        last = {"logits_to_keep": 1}
        known = inspect.signature(model.forward).parameters
        self._options = {"use_cache": True} | (last if "logits_to_keep" in known else {})
        self.logits: Any = None  # [batch, 1, vocabulary] of the last token

    def measure(self, batch: int) -> Phases:
        """Returns times of prefill and decode."""
        import torch

        vocabulary = self._model.get_input_embeddings().num_embeddings
        drawn = tokens_of(vocabulary, batch, self._prompt + self._new)
        tokens = torch.from_numpy(drawn)
        cache: Any = None

        def prefill() -> None:
            nonlocal cache
            found = self._model(tokens[:, : self._prompt], **self._options)
            cache, self.logits = getattr(found, "past_key_values", None), found.logits

        def decode() -> None:
            for step in range(self._prompt, tokens.shape[1]):
                given = tokens[:, step : step + 1]
                found = self._model(given, past_key_values=cache, **self._options)
                self.logits = found.logits

        with torch.inference_mode():
            first = timed(prefill)
            if cache is None:
                raise Refused(f"{self._source} keeps no keys and values, so that it has no decode")
            return {"prefill": first, "decode": timed(decode)}


class LlamaCpp:
    """A language model in llama.cpp, by the C interface that llama-cpp-python wraps.

    Settings are llama.cpp's own but for threads and GPUs. So keys and values are stored in 16 bits.
    """

    def __init__(self, source: str, *, prompt: int, new: int, threads: int, **_: Any):
        self._api: Any = importlib.import_module("llama_cpp")
        self._prompt, self._new, self._threads = prompt, new, threads
        self._api.llama_backend_init()
        settings = self._api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = self._api.llama_model_load_from_file(os.fsencode(source), settings)
        if not self._model:
            raise Explained
        most = self._api.llama_model_n_ctx_train(self._model)
        require_positions(source, most, prompt, new)
        self.runtime = f"llama-cpp-python {metadata.version('llama_cpp_python')}"
        self.form = _quantisation(self._description())
        self._contexts: dict[int, _Context] = {}

    def _description(self) -> str:
        """Returns architecture, size and quantisation."""
        buffer = self._api.ctypes.create_string_buffer(256)
        self._api.llama_model_desc(self._model, buffer, len(buffer))
        return str(buffer.value.decode())

    def measure(self, batch: int) -> Phases:
        """Returns times of prefill and decode."""
        if batch not in self._contexts:
            sizes = (batch, self._prompt, self._new, self._threads)
            self._contexts[batch] = _Context(self._api, self._model, *sizes)
        context = self._contexts[batch]
        context.clear()
        return {"prefill": timed(context.prefill), "decode": timed(context.decode)}


def _quantisation(description: str) -> str:
    """Returns the weights' form: Q4_K_M of "llama 135M Q4_K - Medium", F32 of "… all F32"."""
    form = description.split(" ", 2)[2].removeprefix("all ")
    name, _, size = form.partition(" - ")
    return f"{name}_{size[0]}" if size in ("Small", "Medium", "Large") else form


class _Context:
    """Keys and values of a number of sequences, and the batches that fill them."""

    def __init__(self, api: Any, model: Any, batch: int, prompt: int, new: int, threads: int):
        self._api, self._prompt, self._new = api, prompt, new
        settings = api.llama_context_default_params()
        settings.n_seq_max = batch
        settings.n_ctx = batch * (prompt + new)
        settings.n_batch = max(settings.n_batch, batch * prompt)
        settings.n_threads = settings.n_threads_batch = threads
        settings.op_offload = False
        self._context = api.llama_init_from_model(model, settings)
        if not self._context:
            raise Explained
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._tokens = tokens_of(self._vocabulary, batch, prompt + new).tolist()
        self._given = api.llama_batch_init(batch * prompt, 0, 1)

    def clear(self) -> None:
        """Forgets the sequences."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def prefill(self) -> None:
        """Reads the prompt of each sequence."""
        self._read(0, self._prompt)

    def decode(self) -> None:
        """Reads the new tokens of all sequences one by one."""
        for step in range(self._prompt, self._prompt + self._new):
            self._read(step, step + 1)

    def _read(self, start: int, stop: int) -> None:
        """Reads tokens start to stop of each sequence; computes the logits of the last."""
        given, count = self._given, 0
        for sequence, tokens in enumerate(self._tokens):
            for position in range(start, stop):
                given.token[count] = tokens[position]
                given.pos[count] = position
                given.n_seq_id[count] = 1
                given.seq_id[count][0] = sequence
                given.logits[count] = position + 1 == stop
                count += 1
        given.n_tokens = count
        if status := self._api.llama_decode(self._context, given):
            raise RuntimeError(f"llama_decode returns {status}")
        self._api.llama_synchronize(self._context)

    def logits(self) -> np.ndarray:
        """Returns the logits [batch, vocabulary] of the last tokens that were read."""
        found = self._api.llama_get_logits(self._context)
        shape = (len(self._tokens), self._vocabulary)
        return np.array(np.ctypeslib.as_array(found, shape=shape))


class OnnxRuntime:
    """A vision network in ONNX Runtime."""

    def __init__(self, source: str, *, passes: int, threads: int, **_: Any):
        api: Any = importlib.import_module("onnxruntime")
        settings = api.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        providers = ["CPUExecutionProvider"]
        self._session = api.InferenceSession(source, settings, providers=providers)
        self._source, self._passes = source, passes
        self.runtime = f"onnxruntime {metadata.version('onnxruntime')}"
        given = self._session.get_inputs()
        if len(given) != 1 or not _is_images(given[0]):
            told = ", ".join(f"{each.name} {each.type} {each.shape}" for each in given)
            raise Refused(
                f"{source} takes {told}; the speed of ONNX files is measured for networks of one "
                "input of floats, of which only the first size varies"
            )
        (self._input,) = given
        self.form = "float16" if "16" in self._input.type else "float32"

    def measure(self, batch: int) -> Phases:
        """Returns the time of the passes over one batch of random images."""
        first, *rest = self._input.shape
        if isinstance(first, int) and first != batch:
            raise Refused(
                f"{self._source} takes batches of {first}, not of {batch}; give --batch {first}"
            )
        drawn = np.random.default_rng(0).standard_normal((batch, *rest))
        images = {self._input.name: drawn.astype(self.form)}

        def forward() -> None:
            for _ in range(self._passes):
                self._session.run(None, images)

        return {"forward": timed(forward)}


def _is_images(given: Any) -> bool:
    """Returns whether an input is of floats, and has sizes but for the first."""
    sizes = given.shape[1:]
    return given.type in ("tensor(float)", "tensor(float16)") and all(
        isinstance(size, int) for size in sizes
    )


# By kind of a file.
ENGINES: dict[str, Callable[..., Any]] = {
    "transformers": Transformers,
    "gguf": LlamaCpp,
    "onnx": OnnxRuntime,
}
