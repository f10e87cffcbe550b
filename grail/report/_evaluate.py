"""Perplexity and size of a causal language model on token batches; its distance from another."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from grail.arguments import require_batches, require_language_model
from grail.calibrate.embedding import check_token_ids
from grail.errors import EmptyCalibrationError, InputError, ModelError
from grail.report.logits import BatchLogits, Network, Recorded, steps
from grail.report.paired import weighted
from grail.report.report import Evaluation
from grail.runtime.transaction import eval_no_grad
from grail_kernels import check_kind, kind_of

_PROBED = 8  # tokens that show whether a model looks ahead


class DenseReference:
    """The outputs of a dense network on some batches, for `evaluate` to compare others with.

    Args:
        model, batches, progress: as for `evaluate`.

    Attributes:
        evaluation: the dense network's own.

    Memory: copies of the last hidden states [tokens, features] and of the output layer
    [vocabulary, features], on the host and in the model's dtype; the network may then change or go.
    Where its logits cannot be computed from the hidden states alone, or its output layer is no
    linear layer in memory, the network itself is kept, runs again for each evaluation, and must
    stay as it is (`runs_model`).

    Raises:
        EmptyCalibrationError, InputError, ModelError: as `evaluate`.
    """

    def __init__(
        self,
        model: Any,
        batches: Iterable[Tensor | Mapping[str, Tensor]],
        *,
        progress: bool = True,
    ):
        require_language_model(model)
        require_batches(batches)
        network = Network(model)
        self.recorded = Recorded(network)
        with eval_no_grad(model):
            sums = _Sums()
            _run(network, batches, sums, progress, record=self.recorded.record)
        self.evaluation = _evaluation(model, sums)

    @property
    def runs_model(self) -> bool:
        """Whether the dense network runs again for each evaluation."""
        return self.recorded.runs_model

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return self.recorded.nbytes


def evaluate(
    model: Any,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    against: Any = None,
    progress: bool = True,
) -> Evaluation:
    """Measures next-token predictions inside each sequence, alone or against a dense network.

    Args:
        model: a transformers causal language model.
        batches: int64 tokens [sequences, length], or keyword arguments of the model's forward;
            predictions of tokens that an `attention_mask` [sequences, length] hides do not count.
        against: the dense network, which then runs on the batches as well, or a
            `grail.DenseReference` that was made of it once on the same batches.
        progress: shows a progress bar.

    Returns:
        Perplexity exp(mean over predicted tokens of −log p), infinite where fp64 cannot hold it;
        `losses`, the mean −log p of each sequence that has a token to predict; the model's size.
        With `against`: `kl`, the mean over predicted tokens of KL(dense‖model) = Σ p ln(p/q) over
        the vocabulary in nats, and `top1`, the share of predictions whose most likely token is the
        dense network's; `kl_error` and `top1_error`, their standard errors over sequences (None of
        one); `divergences`, `agreements` and `predicted`, the same means and the number of
        predicted tokens of each sequence.

    Raises:
        EmptyCalibrationError: the batches hold no token to predict.
        InputError: a token id that the model's embedding does not have; a reference of other
            batches or another vocabulary.
        ModelError: a loss is NaN or Inf, or the model sees the tokens that it should predict.

    Numerics: log-probabilities in fp32 whatever the model's dtype, their sums in fp64.
    """
    require_language_model(model)
    require_batches(batches)
    sums = _Sums()
    dense: Network | Recorded | None = None
    with ExitStack() as stack:
        stack.enter_context(eval_no_grad(model))
        if isinstance(against, DenseReference):
            dense = against.recorded
        elif against is not None:
            _require_against(against)
            stack.enter_context(eval_no_grad(against))
            dense = Network(against)
        _run(Network(model), batches, sums, progress, dense=dense)
    return _evaluation(model, sums)


def _require_against(against: Any) -> None:
    try:
        require_language_model(against)
    except InputError as error:
        raise InputError(
            "against must be a causal language model of transformers or a grail.DenseReference; "
            f"got {kind_of(against)}"
        ) from error


def _evaluation(model: nn.Module, sums: "_Sums") -> Evaluation:
    if sums.predicted == 0:
        raise EmptyCalibrationError(
            "the evaluation batches hold no token to predict; give sequences of 2 or more tokens"
        )
    if not math.isfinite(sums.loss) or any(map(math.isnan, sums.divergences)):
        raise ModelError(
            "the model's loss on the evaluation text is NaN or Inf: its weights or activations "
            "are not finite; check the checkpoint, or use a wider dtype"
        )
    parameters, size = measure_size(model)
    found = Evaluation(
        perplexity=_exp(sums.loss / sums.predicted),
        tokens=sums.predicted,
        parameters=parameters,
        bytes=size,
        losses=sums.losses,
        predicted=sums.counts,
    )
    if sums.compared:
        kl, top1 = (weighted(each, sums.counts) for each in (sums.divergences, sums.agreements))
        found.kl, found.kl_error = kl.value, kl.error
        found.top1, found.top1_error = top1.value, top1.error
        found.divergences, found.agreements = sums.divergences, sums.agreements
    return found


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


class _Sums:
    """Sums over the predicted tokens of all batches, and means over those of each sequence."""

    def __init__(self) -> None:
        self.loss, self.predicted = 0.0, 0
        # Of each sequence that has a token to predict.
        self.losses: list[float] = []
        self.counts: list[int] = []
        self.divergences: list[float] = []
        self.agreements: list[float] = []
        self.compared = False

    def add(self, own: BatchLogits, dense: BatchLogits | None, targets: Tensor) -> None:
        """Adds a batch with `targets` [sequences, positions], −100 where hidden."""
        expected = targets.flatten()
        rows = torch.zeros((3, *expected.shape), dtype=torch.float64, device=targets.device)
        for start, stop in steps(own, dense, *targets.shape):
            part = slice(start, stop)
            logits = own.rows(start, stop)
            if dense is None:
                rows[0, part] = _cross_entropy(logits, expected[part])
                continue
            self.compared = True
            compared = _compare(logits, dense.rows(start, stop), expected[part])
            for of, values in zip(rows, compared, strict=True):
                of[part] = values
        sums, counts = rows.view(3, *targets.shape).sum(2), (targets >= 0).sum(1)
        self.loss += sums[0].sum().item()
        self.predicted += int(counts.sum())
        shown = counts > 0
        losses, divergences, agreements = (sums[:, shown] / counts[shown]).tolist()
        self.losses += losses
        self.counts += counts[shown].tolist()
        if dense is not None:
            self.divergences += divergences
            self.agreements += agreements


@torch.inference_mode()
def _run(
    network: Network,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    sums: _Sums,
    progress: bool,
    *,
    dense: Network | Recorded | None = None,
    record: Callable[[BatchLogits, Tensor], None] | None = None,
) -> None:
    """Adds all batches to `sums`, compared with a dense network; `record` is given each."""
    model = network.model
    for index, batch in enumerate(
        tqdm(batches, desc="perplexity", unit="batch", disable=not progress, leave=False)
    ):
        given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        _require_tokens(given.get("input_ids"))
        check_token_ids(model, given)
        inputs = {name: value.to(model.device) for name, value in given.items()}
        targets = _targets(inputs)
        if not network.probed and targets.numel():
            require_causal(model, inputs["input_ids"])
        own = network.logits(index, inputs, targets)
        if record is not None:
            record(own, targets)
        sums.add(own, None if dense is None else dense.logits(index, inputs, targets), targets)


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


def _cross_entropy(
    logits: Tensor,  # [rows, vocabulary]
    targets: Tensor,  # [rows]
) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=-100)


def _compare(
    logits: Tensor,  # [rows, vocabulary]
    dense: Tensor,  # [rows, vocabulary]
    targets: Tensor,  # [rows]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns losses, KL(dense‖model) and whether the likeliest token agrees, [rows] each.

    All are 0 where the target is hidden.
    """
    if logits.shape != dense.shape:
        raise InputError(
            f"the model predicts {logits.shape[1]:,} tokens and the dense reference "
            f"{dense.shape[1]:,}; compare models of one vocabulary"
        )
    dense, hidden = dense.to(logits.device), targets < 0
    agreed = (logits.argmax(1) == dense.argmax(1)) & ~hidden
    own, dense = (each.float().log_softmax(1) for each in (logits, dense))
    terms = F.kl_div(own, dense, reduction="none", log_target=True)
    terms.masked_fill_(dense == -math.inf, 0.0)  # p ln(p/q) is 0 where p is
    divergence = terms.sum(1, dtype=torch.float64).masked_fill_(hidden, 0.0)
    losses = F.nll_loss(own, targets, reduction="none", ignore_index=-100)
    return losses, divergence, agreed
