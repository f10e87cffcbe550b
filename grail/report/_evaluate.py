"""Perplexity and size of a causal language model on token batches."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from grail.arguments import require_batches, require_language_model
from grail.calibrate.embedding import check_token_ids
from grail.errors import EmptyCalibrationError, InputError, ModelError
from grail.report.report import Evaluation
from grail.runtime.transaction import eval_no_grad
from grail_kernels import check_kind

_PROBED = 8  # tokens that show whether a model looks ahead
_LOGITS = 1 << 24  # logits held at a time, 64 MiB of fp32: 16 sequences × 1024 × 49152 are 3 GiB


def evaluate(
    model: Any, batches: Iterable[Tensor | Mapping[str, Tensor]], *, progress: bool = True
) -> Evaluation:
    """Measures the perplexity of next-token predictions inside each sequence.

    Args:
        model: a transformers causal language model.
        batches: int64 tokens [sequences, length], or keyword arguments of the model's forward;
            predictions of tokens that an `attention_mask` [sequences, length] hides do not count.
        progress: shows a progress bar.

    Returns:
        Perplexity exp(mean over predicted tokens of −log p), infinite where fp64 cannot hold it,
        and the model's size.

    Raises:
        EmptyCalibrationError: the batches hold no token to predict.
        InputError: a token id that the model's embedding does not have.
        ModelError: a loss is NaN or Inf, or the model sees the tokens that it should predict.

    Numerics: log-probabilities in fp32 whatever the model's dtype, their sum in fp64.
    """
    require_language_model(model)
    require_batches(batches)
    with eval_no_grad(model):
        loss, predicted = _total_loss(model, batches, progress)
    if predicted == 0:
        raise EmptyCalibrationError(
            "the evaluation batches hold no token to predict; give sequences of 2 or more tokens"
        )
    if not math.isfinite(loss):
        raise ModelError(
            "the model's loss on the evaluation text is NaN or Inf: its weights or activations "
            "are not finite; check the checkpoint, or use a wider dtype"
        )
    parameters, size = measure_size(model)
    return Evaluation(
        perplexity=_exp(loss / predicted), tokens=predicted, parameters=parameters, bytes=size
    )


@torch.inference_mode()
def require_causal(
    model: Any,
    tokens: Tensor,  # [sequences, length]
) -> None:
    """Raises ModelError where logits change with later tokens, as those of BERT do.

    The second half of a short sequence is replaced. The logits of its first half may change by
    rounding alone: experts multiply as many tokens at a time as are routed to them.
    """
    sequence = tokens[:1, :_PROBED].to(model.device)
    kept = sequence.shape[1] // 2
    rows = model.get_input_embeddings().num_embeddings
    other = sequence.clone()
    other[:, kept:] = (other[:, kept:] + rows // 2) % rows
    with eval_no_grad(model):
        before, after = (
            model(input_ids=ids, use_cache=False).logits[0, :kept] for ids in (sequence, other)
        )
    allowed = math.sqrt(torch.finfo(before.dtype).eps)
    if (before - after).abs().max() > allowed * before.abs().max():
        raise ModelError(
            f"{type(model).__name__} sees the tokens that it should predict: its logits change "
            "with later tokens, so it is no causal language model; set is_decoder=True in its "
            "configuration if it was trained as one, else compress it in Python (grail.compress)"
        )


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def measure_size(model: nn.Module) -> tuple[int, int]:
    """Counts parameters, and bytes of the tensors that a checkpoint holds; tied ones once."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, sum(tensor.nbytes for tensor in _stored(model))


def bfloat16_bytes(model: nn.Module) -> int:
    """Counts bytes of a checkpoint whose floating-point tensors are bf16."""
    return sum(
        tensor.numel() * torch.bfloat16.itemsize if tensor.is_floating_point() else tensor.nbytes
        for tensor in _stored(model)
    )


def _stored(model: nn.Module) -> Iterable[Tensor]:
    return {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()


@torch.inference_mode()
def _total_loss(
    model: Any, batches: Iterable[Tensor | Mapping[str, Tensor]], progress: bool
) -> tuple[float, int]:
    """Returns summed loss and number of predicted tokens."""
    loss, predicted = 0.0, 0
    loss_of: Callable[[Any, dict[str, Tensor], Tensor], Tensor] | None = None
    for batch in tqdm(batches, desc="perplexity", unit="batch", disable=not progress, leave=False):
        given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        _require_tokens(given.get("input_ids"))
        check_token_ids(model, given)
        inputs = {name: value.to(model.device) for name, value in given.items()}
        targets = _targets(inputs)
        if loss_of is None:
            if targets.numel():
                require_causal(model, inputs["input_ids"])
            loss_of = _choose_loss(model, inputs)
        loss += loss_of(model, inputs, targets).item()
        predicted += int((targets >= 0).sum())
    return loss, predicted


def _require_tokens(tokens: object) -> None:
    """Raises InputError for anything but token ids [sequences, length]."""
    check_kind("a batch's input_ids", tokens, Tensor, "a torch.Tensor")
    assert isinstance(tokens, Tensor)
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise InputError(
            f"a batch of token ids must be integers [sequences, length]; got {tokens.dtype} "
            f"{tuple(tokens.shape)}"
        )


def _targets(inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the token after each position but the last [sequences, length − 1]; −100: hidden."""
    targets = inputs["input_ids"][:, 1:]
    mask = inputs.get("attention_mask")
    return targets if mask is None else targets.masked_fill(mask[:, 1:] == 0, -100)


def _choose_loss(model: Any, inputs: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """Returns the chunked loss if the logits are exactly the output layer of the hidden states.

    Some architectures scale or cap their logits after that layer; sixteen tokens show it.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return _loss_of_sequences
    tokens = inputs["input_ids"][:1, :16]
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    if head.weight.shape[1] != hidden.shape[-1]:
        return _loss_of_sequences  # ELECTRA projects them first
    logits = model(input_ids=tokens, use_cache=False).logits
    return _loss_in_chunks if torch.equal(head(hidden), logits) else _loss_of_sequences


def _loss_in_chunks(model: Any, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    rows = max(1, _LOGITS // head.weight.shape[0])
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for states, expected in zip(hidden.split(rows), targets.split(rows), strict=True):
        total += _cross_entropy(head(states), expected)
    return total


def _loss_of_sequences(model: Any, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Runs the model's own forward, one sequence at a time so that few logits exist at once."""
    total = torch.zeros((), dtype=torch.float64, device=targets.device)
    for index, expected in enumerate(targets):
        sequence = {name: value[index : index + 1] for name, value in inputs.items()}
        total += _cross_entropy(model(**sequence, use_cache=False).logits[0, :-1], expected)
    return total


def _cross_entropy(
    logits: Tensor,  # [rows, vocabulary]
    targets: Tensor,  # [rows]
) -> Tensor:
    losses = F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)
    return losses.sum(dtype=torch.float64)
