"""`generate_calibration`: calibration text that a model writes itself, in a file.

OUTPUT.partial/settings.state     what the text depends on
OUTPUT.partial/batch-000003.state the documents of the fourth batch of sequences
OUTPUT.partial/lock               locked by the run that writes

A killed run resumes after its last batch and ends with the same file.
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grail.arguments import as_path, require_switches
from grail.errors import InputError, ModelError
from grail.files import generated
from grail.files.load import LENGTH, length_of_sequences
from grail.files.mixture import AnyText, Mixture, as_text
from grail.files.pretrained import Pretrained
from grail.files.text import Text
from grail.report.formatting import format_seconds
from grail.run.fingerprint import model_fingerprint
from grail.run.sampling import Sampling, continuations, uniforms
from grail.runtime import state
from grail.runtime.folder import PARTIAL, require_new_file
from grail.runtime.lock import locked
from grail.runtime.settings import refuse_unknown

_SETTINGS, _BATCH = "settings", "batch"  # kinds of state files
_BYTES = 16  # on the disk for a token, in both forms; English takes about 10
_FEW, _MORE = 2, 8  # tokens written to predict the time


@dataclass(frozen=True)
class GeneratedText:
    """A file of text that a model wrote."""

    path: Path
    sequences: int
    documents: int
    tokens: int  # as the model's tokenizer reads them, each document with an end
    seconds: float  # of writing, in this call
    written: int  # tokens drawn in this call; 0 if the file was there


@dataclass(frozen=True)
class _Batch:
    """The sequences that were written at once: the documents of each, and the tokens of all."""

    documents: list[list[str]]
    tokens: int


def generate_calibration(
    source: str | Path | Pretrained,
    output: str | Path,
    *,
    prompts: AnyText | None = None,
    progress: bool = True,
    **sampling: Any,
) -> GeneratedText:
    """Writes calibration text that a causal language model draws itself.

    Each sequence begins with the tokenizer's begin-of-text token (end-of-text, if it has none),
    which the file leaves out, and with the first tokens of `prompts`. It has its full length;
    end-of-text tokens separate the documents in it. The file has a document a line, {"text": …},
    and `grail.Text(output)` reads it back. The tokens that are read may differ from those drawn,
    where the tokenizer has several spellings of a text.

    The same call on the same device writes the same file. Nothing is written where it is there
    already; a killed call resumes from `output`.partial.

    Args:
        source: a transformers folder, a hub name or a .gguf file, or a `grail.Pretrained`.
        output: file to create, ending in .jsonl.
        prompts: text whose first tokens are continued, in sequences of `prompt_tokens`, drawn at
            random. Where it has too few for all sequences, they are used again.
        progress: shows a progress bar, and prints the time that is predicted.
        sampling: tokens (65536), temperature (1.0), top_p (0.98), seed (0), begin (the token that
            begins each sequence), prompt_tokens (32), sequence_length (1024, or all that the model
            has positions for) and batch_size (16). The result depends on all of them.

    Returns:
        Path and contents of the file.

    Raises:
        InputError: wrong settings, a file of another call, a tokenizer with no token to begin
            with, prompts that cannot be read or are as long as a sequence.
        ModelError: the model cannot generate, its logits are not finite, or it writes no text.
        StateError, ExportError: the file could not be written, for instance on a full disk.
    """
    if not isinstance(source, Pretrained):
        source = Pretrained(str(as_path("source", source)))
    output = as_path("output", output)
    require_switches(progress=progress)
    refuse_unknown(sampling, [field.name for field in fields(Sampling)])
    how = Sampling(**sampling)
    generated.require_name(output)
    if output.exists():
        generated.require_same(output, generated.made(output), _known(how))
    else:
        require_new_file(output)
        state.require_space(output.parent, _BYTES * how.tokens)
    device = source.computing
    text = None
    if prompts is not None:
        text = _starting(as_text("prompts", prompts), how).checked(source.source)
    network, tokenizer = source.load(device)
    return _Writer(output, network, tokenizer, how, text, progress).run()


def _known(how: Sampling) -> dict[str, Any]:
    """Returns the settings of a text that are known before the model is loaded."""
    later = ("sequence_length", "prompt_tokens")
    return {name: value for name, value in asdict(how).items() if name not in later}


def _starting(text: Text | Mixture, how: Sampling) -> Text | Mixture:
    """Returns a text that is read in sequences of the length of prompts, one for each sequence."""
    least = len(text.texts) if isinstance(text, Mixture) else 1
    count = max(least, math.ceil(how.tokens / (how.sequence_length or LENGTH)))
    length = how.prompt_tokens
    size: dict[str, Any] = {"sequence_length": length, "tokens": count * length}
    option = "prompts" if text.option == "calibration" else text.option
    return replace(text, **size, seed=how.seed, option=option)


class _Writer:
    """A call while it is carried out."""

    def __init__(
        self,
        output: Path,
        network: Any,
        tokenizer: Any,
        how: Sampling,
        text: Text | Mixture | None,
        progress: bool,
    ):
        if not network.can_generate():
            raise ModelError(
                f"{type(network).__name__} cannot generate text; give a causal language model"
            )
        self._output, self._network, self._tokenizer = output, network, tokenizer
        self._progress = progress
        self._how = replace(how, sequence_length=length_of_sequences(network, how.sequence_length))
        self._length = self._how.sequence_length or 0
        origin = None
        self._starts = torch.empty(1, 0, dtype=torch.int64)
        if text is not None:
            batches, origin = text.read(network, tokenizer)
            self._starts = torch.cat(batches)
        self._begin = self._first_token(text is not None)
        if self._first + self._starts.shape[1] >= self._length:
            raise InputError(
                f"prompts of {self._starts.shape[1]} tokens leave no room in sequences of "
                f"{self._length}; give a smaller prompt_tokens (--prompt-tokens)"
            )
        self._made = {
            "model": model_fingerprint(network)["weights"],
            **asdict(self._how),
            "prompt_tokens": self._starts.shape[1],
            "prompts": None if origin is None else origin["tokens_sha256"],
        }

    def _first_token(self, prompted: bool) -> list[int]:
        """Returns the token that begins every sequence, if there is one."""
        if self._how.begin is not None:
            ids = self._tokenizer(self._how.begin, add_special_tokens=False).input_ids
            # Some tokenizers call the token between documents their unknown one as well.
            known = self._how.begin == self._tokenizer.unk_token
            if len(ids) == 1 and (known or ids[0] != self._tokenizer.unk_token_id):
                return list(ids)
            raise InputError(
                f"begin must be one token of the tokenizer; got {self._how.begin!r}; leave it out "
                f"for {self._tokenizer.bos_token or self._tokenizer.eos_token}"
            )
        for found in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if found is not None:
                return [int(found)]
        if not prompted:
            raise InputError(
                "the tokenizer has neither a begin-of-text nor an end-of-text token to start from; "
                "give a text to continue (--prompts)"
            )
        return []

    @property
    def _first(self) -> int:
        """The tokens before the prompt."""
        return len(self._begin)

    @property
    def _wanted(self) -> int:
        """The tokens of the file, in whole sequences."""
        return math.ceil(self._how.tokens / self._length) * self._length

    def run(self) -> GeneratedText:
        """Writes the file, or finds it."""
        folder = self._output.with_name(self._output.name + PARTIAL)
        if self._output.exists():
            generated.require_same(self._output, generated.made(self._output), self._made)
            return self._result(generated.read(self._output), 0.0, 0)
        start, drawn = time.perf_counter(), 0
        with locked(folder):
            batches = self._resumed(folder)
            done = sum(batch.tokens for batch in batches)
            self._predict(done)
            with self._bar(done) as bar:
                while done < self._wanted:
                    batch = self._write(batches, done, bar)
                    content = {"documents": batch.documents, "tokens": batch.tokens}
                    state.write(folder / _name(len(batches)), _BATCH, content, {})
                    batches.append(batch)
                    drawn += len(batch.documents) * self._new
                    done += batch.tokens
            sequences = [texts for batch in batches for texts in batch.documents]
            generated.write(self._output, sequences, self._made)
        shutil.rmtree(folder, ignore_errors=True)
        return self._result(sequences, time.perf_counter() - start, drawn)

    def _resumed(self, folder: Path) -> list[_Batch]:
        """Returns the batches that an earlier call wrote.

        Raises:
            InputError: it was another call.
        """
        state.discard_unfinished(folder)
        settings = folder / f"{_SETTINGS}.state"
        if settings.exists():
            generated.require_same(folder, state.read(settings, _SETTINGS).content, self._made)
        else:
            state.write(settings, _SETTINGS, self._made, {})
        batches: list[_Batch] = []
        while (path := folder / _name(len(batches))).exists():
            batches.append(_Batch(**state.read(path, _BATCH).content))
        return batches

    @property
    def _new(self) -> int:
        """The tokens that are drawn for each sequence."""
        return self._length - self._first - self._starts.shape[1]

    def _rows(self, done: int) -> int:
        """Returns the sequences of the next batch, when so many tokens are there."""
        return min(self._how.batch_size, math.ceil((self._wanted - done) / self._length))

    def _starts_of(self, sequences: Sequence[int]) -> Tensor:
        """Returns the tokens with which sequences start [sequences, length]."""
        begin = torch.tensor([self._begin] * len(sequences), dtype=torch.int64)
        chosen = self._starts[torch.tensor(sequences, dtype=torch.int64) % len(self._starts)]
        return torch.cat([begin.reshape(len(sequences), -1), chosen], dim=1)

    def _write(self, batches: Sequence[_Batch], done: int, bar: Any) -> _Batch:
        """Draws the next batch."""
        first = sum(len(batch.documents) for batch in batches)
        numbers = range(first, first + self._rows(done))
        drawn = continuations(
            self._network,
            self._starts_of(numbers),
            uniforms(self._how.seed, numbers, self._new),
            self._how,
            bar.update,
        )
        found = [generated.documents(row, self._tokenizer, self._first) for row in drawn.tolist()]
        tokens = sum(generated.tokens_read(texts, self._tokenizer) for texts in found)
        if not tokens:
            raise ModelError(
                f"the model wrote no text in {len(found)} sequences, only tokens that end one; "
                "raise the temperature, or give prompts"
            )
        return _Batch(found, tokens)

    def _predict(self, done: int) -> None:
        """Prints the time that the rest takes, from a few tokens of one batch."""
        if not self._progress or done >= self._wanted:
            return
        rows = self._rows(done)
        seconds = []
        few, more = min(_FEW, self._new), min(_MORE, self._new)
        for new in (few, more):
            numbers = torch.zeros(rows, new, dtype=torch.float64)
            begun = time.perf_counter()
            continuations(self._network, self._starts_of(range(rows)), numbers, self._how)
            seconds.append(time.perf_counter() - begun)
        each = max(0.0, seconds[1] - seconds[0]) / max(1, more - few)
        batches = math.ceil((self._wanted - done) / (rows * self._length))
        total = batches * (seconds[0] + each * (self._new - few))
        print(
            f"Predicted for {self._wanted - done:,} tokens in sequences of {self._length}: time "
            f"about {format_seconds(total)}.",
            file=sys.stderr,
        )

    def _bar(self, done: int) -> Any:
        """Returns the bar of the tokens to draw."""
        total = math.ceil((self._wanted - done) / self._length) * self._new
        return tqdm(
            total=total, desc="writing", unit="tok", unit_scale=True, disable=not self._progress
        )

    def _result(
        self, sequences: Sequence[Sequence[str]], seconds: float, drawn: int
    ) -> GeneratedText:
        texts = [text for of_sequence in sequences for text in of_sequence]
        tokens = generated.tokens_read(texts, self._tokenizer)
        path = self._output.resolve()
        return GeneratedText(path, len(sequences), len(texts), tokens, seconds, drawn)


def _name(batch: int) -> str:
    return f"{_BATCH}-{batch:06}.state"
