"""The commands: they read arguments, call the library and print. Nothing is computed here.

Every `GrailError` and every wrong option ends as one sentence on stderr and exit code 2, any other
exception as one sentence and exit code 1, Ctrl-C as exit code 130. What a person reads on the way
(progress, predictions) goes to stderr, results go to stdout.
"""

import errno
import json
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import torch
import typer
from torch import Tensor
from typer.core import TyperGroup

from grail import __version__, select
from grail.algebra._fit import Auto, Toward
from grail.algebra.gram import NonFinite
from grail.algebra.width import check_keep
from grail.arguments import require_usable
from grail.calibrate.embedding import check_token_ids
from grail.commands.console import print_table
from grail.errors import GrailError, InputError, one_line
from grail.files.calibration import Join, require_text, token_batches
from grail.files.load import (
    CheckpointWarning,
    length_before_loading,
    length_of_sequences,
    load_model,
    positions,
)
from grail.files.provenance import provenance
from grail.files.texts import (
    HELD_OUT_SPLITS,
    Split,
    full_name,
    is_plain_text,
    is_wikitext2,
    split_of,
)
from grail.networks import find
from grail.recipe import Recipe
from grail.report._evaluate import evaluate as evaluate_model
from grail.report._evaluate import require_causal
from grail.report.formatting import format_bytes, format_count, format_seconds
from grail.report.page import page
from grail.report.report import Report, strict_json
from grail.report.summary import (
    evaluation_table,
    headline,
    labelled,
    resumed_sentence,
    size_sentence,
    stage_table,
    verdict,
)
from grail.run import resume_folder
from grail.run._collect import Collected
from grail.run._collect import collect as collect_statistics
from grail.run._collect import merge as merge_statistics
from grail.run._inspect import KEEPS, Inspection
from grail.run._inspect import inspect as inspect_model
from grail.run._sensitivity import require_single_channels
from grail.run.workflow import IMPORTING, LOADING, Study, attribute, text_of
from grail.runtime.clock import Stages
from grail.runtime.folder import check_output, file_hash
from grail.runtime.memory import ran_out
from grail.runtime.processes import current_processes, launched
from grail.runtime.settings import Runtime

_DEBUG = "grail.debug"

# Options that belong together stand together in the help text.
_Restoring = partial(typer.Option, rich_help_panel="Restoring")
_Comparing = partial(typer.Option, rich_help_panel="Comparing on held-out text")
_Running = partial(typer.Option, rich_help_panel="Running")
_Reading = partial(typer.Option, rich_help_panel="Reading text")
# The option class's error; typer does not export it.
_UsageError: Any = typer.BadParameter.__base__

# Perplexity on WikiText-2 as in the literature: windows of so many tokens, and all of them.
_WIKITEXT2_WINDOW = 2048
_EVALUATE_TOKENS = 16384
_MOST = 10**30  # tokens; a text that has fewer gives all
_MOST_AT_A_TIME = 1 << 31  # sequences of a batch, or tokens of a sequence
_MOST_SEED = (1 << 63) - 1
_MULTIPLIERS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def _number_or_auto(text: str) -> float | Auto:
    try:
        return "auto" if text.lower() == "auto" else float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto") from error


def _count(text: object) -> int:
    """A number of tokens: 65536, 65_536, 64k or 1M, where k is 1024 and M 1024²."""
    found = re.fullmatch(r"0*(\d[\d_]{0,45}) *([km]?)", str(text).strip().lower())
    count = int(found[1].replace("_", "")) * _MULTIPLIERS[found[2]] if found else 0
    if not 1 <= count <= _MOST:
        shown = repr(text) if len(str(text)) <= 40 else f"a text of {len(str(text))} characters"
        raise typer.BadParameter(
            f"{shown} is no number of tokens; give one of at least 1 and at most 10³⁰, such as "
            "65536, 64k or 1M"
        )
    return count


def _shares(text: object) -> list[float]:
    try:
        return [
            float(part.rstrip("% ")) / (100 if part.endswith("%") else 1)
            for part in str(text).split(",")
        ]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no share; give a number in (0, 1], such as 0.7 or 70%"
        ) from error


def _share(text: object) -> float:
    shares = _shares(text)
    if len(shares) > 1:
        raise typer.BadParameter(
            f"{text!r} are {len(shares)} shares, and a run has one, such as 0.7; run once for "
            "each, or compare them by grail inspect --keep"
        )
    return shares[0]


class Commands(TyperGroup):
    """Turns an exception into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            typer.echo("\ngrail: interrupted; no output was written.", err=True)
            raise typer.Exit(130) from error
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError" or _is_closed_pipe(error):
                raise
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            sentence, status = _explain(error)
            typer.echo(f"grail: {sentence}", err=True)
            raise typer.Exit(status) from error


def _is_closed_pipe(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _explain(error: Exception) -> tuple[str, int]:
    """Returns the sentence for an exception and the exit code: 2 where the user can act on it."""
    if isinstance(error, GrailError):
        return str(error), 2
    if isinstance(error, _UsageError):
        _, *command = error.ctx.command_path.split() if error.ctx else [""]
        said = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        return f"{said[:1].lower()}{said[1:]}; see {' '.join(['grail', *command])} --help", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read or written: {error.strerror}", 2
    if ran_out(error):
        advice = "lower --batch-size or --sequence-length, or choose --device cpu"
        return f"out of memory; no output was written: {advice}.", 2
    return (
        f"unexpected {type(error).__name__}: {one_line(error)}; --debug shows the traceback; "
        "please report it"
    ), 1


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grail {__version__}")
        raise typer.Exit


def _keep_traceback(ctx: typer.Context, wanted: bool) -> None:
    ctx.meta[_DEBUG] = wanted


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder that save_pretrained wrote, a hub name, or a .gguf file.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    _Running(help="Where the model runs: cpu, cuda, cuda:1; auto takes a GPU if there is one."),
]
Onload = Annotated[
    bool,
    _Running(
        help="Leave the model on the CPU and bring one block at a time to the device, for models "
        "larger than a GPU.",
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        parser=_count,
        metavar="COUNT",
        help="Calibration tokens, such as 65536, 64k or 1M. More is better up to about 10⁵.",
    ),
]
Sites = Annotated[
    str,
    typer.Option(
        help="Sites to prune: mlp, heads, or mlp,heads; of mixtures experts, shared_experts."
    ),
]
Field = Annotated[
    str | None,
    _Reading(
        help="Field or column of the text in JSON, CSV, Parquet and datasets: a text, or a chat as "
        "a list of messages, which the tokenizer's chat template renders.",
        show_default="text, else messages",
    ),
]
Joined = Annotated[
    Join | None,
    _Reading(
        help="Between documents: eos the end-of-text token, blank a blank line, none nothing.",
        show_default="eos; blank for WikiText, whose rows are lines",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    _Running(
        "--trust-remote-code",
        help="Run the Python code that MODEL brings along, with your rights: read it first.",
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _Running(help="Dtype of the weights; auto is the checkpoint's own."),
]
SequenceLength = Annotated[
    int | None,
    _Running(
        min=2,
        max=_MOST_AT_A_TIME,
        help="Tokens in a sequence; nothing is padded.",
        show_default="1024, or all that the model has positions for",
    ),
]
BatchSize = Annotated[
    int,
    _Running(min=1, max=_MOST_AT_A_TIME, help="Sequences that go through the model at a time."),
]
Json = Annotated[bool, _Running("--json", help="Print JSON instead of a table.")]
Debug = Annotated[
    bool,
    _Running("--debug", help="Show the traceback of an error.", callback=_keep_traceback),
]


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Makes a trained model structurally smaller, and wins back most of what that costs.

    In closed form: no gradients, no labels, no fine-tuning, a few forward passes over plain text.
    """


@app.command()
def compress(
    ctx: typer.Context,
    model: Model,
    output: Annotated[
        Path,
        typer.Option(help="Folder for model, report.json and report.html; new or empty."),
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text on which activations are collected: .txt, .json, .jsonl, .csv or .parquet, "
            "or a dataset (NAME, NAME:CONFIG, wikitext2). Take text like the text the model is "
            "for.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="In its place, a folder that `grail stats` wrote; with --open-loop."),
    ] = None,
    keep: Annotated[
        float,
        typer.Option(
            parser=_share,
            metavar="SHARE",
            help="Share of the channels or heads that stays, in (0, 1].",
        ),
    ] = 0.7,
    sites: Sites = "mlp",
    uneven: Annotated[
        bool,
        typer.Option(
            help="Let blocks keep more or less, by what their narrowing costs the model, "
            "--keep of all together; OUTPUT is then for grail alone, since stock "
            "configurations hold one width for all blocks. Not for heads, and on the device alone: "
            "no --statistics, --onload, --no-compensate, nor several processes."
        ),
    ] = False,
    selector: Annotated[
        str,
        typer.Option(help=f"Who chooses what stays: {', '.join(select.names())}."),
    ] = "greedy",
    tokens: Tokens = 65536,
    field: Field = None,
    split: Annotated[
        str | None,
        _Reading(help="Split of a dataset for calibration.", show_default="train"),
    ] = None,
    join: Joined = None,
    evaluate: Annotated[
        str | None,
        _Comparing(
            metavar="TEXT",
            help="Held-out text: compares the dense, the pruned and the restored model on it; "
            "with --onload on the CPU. wikitext2 is measured as in the literature: all of the test "
            "split, joined by blank lines, in sequences of 2048 tokens.",
        ),
    ] = None,
    evaluate_tokens: Annotated[
        int | None,
        _Comparing(
            parser=_count,
            metavar="COUNT",
            help="Held-out tokens to predict.",
            show_default="16384; all of wikitext2",
        ),
    ] = None,
    evaluate_field: Annotated[
        str | None,
        _Comparing(help="As --field, for the held-out text.", show_default="--field"),
    ] = None,
    evaluate_split: Annotated[
        str | None,
        _Comparing(help="Split of a held-out dataset.", show_default="test, else validation"),
    ] = None,
    evaluate_join: Annotated[
        Join | None,
        _Comparing(help="As --join, for the held-out text.", show_default="--join"),
    ] = None,
    baseline: Annotated[
        bool,
        _Comparing(help="With --evaluate: also measure plain pruning, in a run of its own."),
    ] = True,
    compensate: Annotated[
        bool,
        _Restoring(help="Rebuild lost channels from kept ones; without, plain pruning."),
    ] = True,
    fit_bias: Annotated[
        bool,
        _Restoring(
            help="Let biases take up the means of what is lost as well; Llama is given them. With "
            "--no-compensate they alone do, which is FLAP's way.",
        ),
    ] = False,
    alpha: Annotated[
        Any,
        _Restoring(
            help="Ridge strength, relative to the mean energy of a kept channel; auto chooses it "
            "at each site by held-out sequences.",
            parser=_number_or_auto,
            metavar="FLOAT|auto",
        ),
    ] = "auto",
    toward: Annotated[
        Toward,
        _Restoring(help="What a strong ridge shrinks to; baseline is plain pruning."),
    ] = "baseline",
    drift_correction: Annotated[
        Any,
        _Restoring(
            help="Share of the drift from the dense network that each consumer also undoes; 0 is "
            "the paper, auto chooses by held-out sequences.",
            parser=_number_or_auto,
            metavar="FLOAT|auto",
        ),
    ] = "auto",
    correct_attention: Annotated[
        bool,
        _Restoring(
            help="Also rewrite the projections to queries, keys and values, so that they see "
            "through drift. Their widths stay as they are."
        ),
    ] = False,
    token_weights: Annotated[
        bool | None,
        _Restoring(
            help="Count a token's error relative to the size of the dense stream where it lands, "
            "as norms see it; without, as in the paper, loud tokens count for more.",
            show_default="where heads alone are narrowed",
        ),
    ] = None,
    closed_loop: Annotated[
        bool,
        _Restoring(
            "--closed-loop/--open-loop",
            help="Calibrate each block behind the already compressed ones, or on the dense model.",
        ),
    ] = True,
    non_finite: Annotated[
        NonFinite,
        _Running(
            help="Calibration tokens with NaN or Inf: refuse the run, or drop and count them."
        ),
    ] = "refuse",
    multiple: Annotated[
        int | None,
        typer.Option(
            help="Round MLP widths to a multiple of this.",
            show_default="128 from 4096 channels up, 8 from 64, else 1",
        ),
    ] = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 4,
    seed: Annotated[
        int, _Running(max=_MOST_SEED, help="Draws calibration sequences and random scores.")
    ] = 0,
    resume_dir: Annotated[
        Path | None,
        _Running(
            help="Folder for the state of the run after each block. After a crash the same command "
            "goes on from there; the state is deleted once the model is written."
        ),
    ] = None,
    device: Device = "auto",
    onload: Onload = False,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compresses MODEL and writes a plain folder that transformers loads.

    Example: `grail compress MODEL --keep 0.7 --calibration text.txt --output out/`

    Add `--evaluate heldout.txt` to see what it cost: perplexity dense, pruned and restored.
    """
    command = {name: str(value) for name, value in ctx.params.items()}
    selector = select.canonical(selector)
    options = Recipe(
        keep=keep,
        sites=sites,
        selector=selector,
        compensate=compensate,
        fit_bias=fit_bias,
        alpha=alpha,
        toward=toward,
        drift_correction=drift_correction,
        correct_attention=correct_attention,
        token_weights="auto" if token_weights is None else token_weights,
        closed_loop=closed_loop,
        multiple=multiple,
        seed=seed,
        non_finite=non_finite,
    )
    device = ctx.with_resource(launched(device))
    processes = current_processes()
    written = output / "report.json"
    done = resume_dir is not None and resume_folder.announced(resume_dir, command)
    done = done and written.exists()  # by a run that was killed right after it had done all
    processes.require_equal("whether the run is done", done)
    if resume_dir is not None and done:
        if processes.number == 0:
            resume_folder.clear(resume_dir)
            _print_result(Report.from_json(written.read_text(encoding="utf-8")), output, as_json)
        return
    if (calibration is None) == (statistics is None):
        raise InputError("give either --calibration or --statistics")
    if uneven and (statistics or onload or processes.count > 1):
        raise InputError(
            "--uneven runs the whole model on calibration text, in one process: give it no "
            "--statistics, and no --onload"
        )
    if uneven and not options.compensate:
        raise InputError(
            "--uneven measures what sites cost once compensated: leave --compensate on"
        )
    if statistics and closed_loop:
        raise InputError("--statistics are of the dense network: give --open-loop with them")
    _refuse_idle_options(ctx, statistics, evaluate)
    check_output(output, apart=resume_dir)
    text = held_out = None
    if calibration is not None:
        text = _Text(calibration, tokens, sequence_length, batch_size, field, split, join, seed)
        text = text.checked(model)
    if evaluate is not None:
        literature = is_wikitext2(evaluate)  # has its own way, whatever the calibration's is
        held_out = _held_out(
            "--evaluate",
            evaluate,
            evaluate_tokens or (None if literature else _EVALUATE_TOKENS),
            None if literature else sequence_length,
            batch_size,
            field if evaluate_field is None and _has_fields(evaluate) else evaluate_field,
            evaluate_split,
            evaluate_join or (None if literature else join),
        ).checked(model)
    collected = None if statistics is None else Collected(statistics)
    device = _computing(device)
    load = partial(_load, model, "cpu" if onload else device, dtype, trust_remote_code)

    stages = Stages()
    with stages(IMPORTING), suppress(ImportError):  # once, where the network is loaded repeatedly
        import_module("transformers.modeling_utils")
    with stages(LOADING), _warnings_as_notes(CheckpointWarning) as unused:
        network, tokenizer = load()
    with _warnings_as_notes() as notes:
        batches = text.batches(network, tokenizer) if text else collected
        assert batches is not None
    with _warnings_as_notes() as others:
        heldout = held_out.batches(network, tokenizer) if held_out else []
    notes = unused + notes + [f"Held-out text: {note}" for note in others]
    if held_out and held_out.is_same_text(text):
        notes.append("The held-out text is the calibration text: the comparison is too kind.")
    if uneven:
        require_single_channels(find(network, options.sites), options)
    origin = provenance(_command_line(ctx), model)
    origin["calibration"] = text_of(calibration or str(statistics), batches)
    if text:
        origin["calibration"] |= text.reading
    if evaluate and held_out:
        origin["evaluation"] = text_of(evaluate, heldout) | held_out.reading
    study = Study(
        network,
        lambda: load()[0],
        tokenizer,
        batches,
        heldout,
        stages,
        Runtime(onload=device if onload else None, resume_dir=resume_dir),
        _say,
    )
    del network
    prediction = study.predict(options, compare=baseline, uneven=uneven)
    check_output(output, prediction.output)
    used = f"{'' if calibration else 'statistics of '}{origin['calibration']['tokens']:,} tokens"
    _say(_prediction(keep, prediction.peak, prediction.total, used))
    _say(f"Time by stage: {_listed(prediction.seconds)}.")

    if heldout:
        _say("Measuring the dense model …")
        study.measure("dense")
    if heldout and baseline:
        study.compare(options, uneven=uneven)
    if uneven:
        _say("Measuring what the model loses by each site …")
        options = study.uneven(options)
        notes.append(
            f"Blocks keep more or less, {keep:g} of all together, by what narrowing each of them "
            'costs. Rows without "uneven" have even widths.'
        )
    _say("Compressing …")
    report = study.run(options)
    attribute(report, _name(model), origin)
    report.notes += notes
    _say("Writing, and loading again to compare …")
    with processes.together():
        if processes.number > 0:
            return  # the first one writes, and the others wait for it
        if resume_dir is not None:
            resume_folder.announce(resume_dir, command)
        study.write(report, prediction, output, page_or_note)
        if resume_dir is not None:
            resume_folder.clear(resume_dir)
    _print_result(report, output, as_json)


@app.command()
def evaluate(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Held-out text, see compress; wikitext2 is measured as in the literature.",
        ),
    ],
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=_count,
            metavar="COUNT",
            help="How many tokens to predict, such as 65536 or 64k.",
            show_default="all",
        ),
    ] = None,
    field: Field = None,
    split: Annotated[
        str | None,
        _Reading(help="Split of a dataset.", show_default="test, else validation"),
    ] = None,
    join: Joined = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measures perplexity and size of MODEL on a text.

    Example: `grail evaluate out/ --text heldout.txt`
    """
    held_out = _held_out(
        "--text", text, tokens, sequence_length, batch_size, field, split, join
    ).checked(model)
    with _notes_said(CheckpointWarning):
        network, tokenizer = _load(model, _computing(device), dtype, trust_remote_code)
    with _notes_said():
        batches = held_out.batches(network, tokenizer)
    row = evaluate_model(network, batches)
    if as_json:
        typer.echo(strict_json(asdict(row)))
    else:
        print_table(*evaluation_table({_name(model): row}))
        typer.echo(f"{row.tokens:,} predicted tokens")


@app.command()
def inspect(
    model: Model,
    sites: Annotated[
        str | None, typer.Option(help="Kinds of sites, see compress.", show_default="all")
    ] = None,
    keep: Annotated[
        list[Any] | None,
        typer.Option(
            parser=_shares,
            metavar="SHARES",
            help="Share that stays, or several: 0.5,0.7.",
            show_default=", ".join(map(str, KEEPS)),
        ),
    ] = None,
    tokens: Tokens = 65536,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 4,
    device: Device = "auto",
    onload: Onload = False,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows the sites of MODEL, what each keep ratio saves, and what a run would cost.

    Nothing is changed or written. Example: `grail inspect MODEL --sites mlp --tokens 24576`
    """
    device = _computing(device)
    keeps = [share for shares in keep or () for share in shares]
    first = keeps[0] if keeps else 0.7
    for share in keeps:
        check_keep(share)
    recipe = None if sites is None else Recipe(sites=sites)
    with _notes_said(CheckpointWarning):
        network, _ = _load(model, "cpu" if onload else device, dtype, trust_remote_code)
    inspection = inspect_model(
        network,
        recipe=recipe,
        keep=first,
        keeps=keeps or KEEPS,
        tokens=tokens,
        sequence_length=length_of_sequences(network, sequence_length),
        batch_size=batch_size,
        onload=device if onload else None,
    )
    inspection.name = _name(model)
    if as_json:
        typer.echo(json.dumps(asdict(inspection), indent=2))
    else:
        _print_inspection(inspection)


stats = typer.Typer(
    no_args_is_help=True,
    help="Statistics that are collected in one place, or in several and added.",
)
app.add_typer(stats, name="stats")


@stats.command("collect")
def stats_collect(
    model: Model,
    calibration: Annotated[
        str, typer.Option(metavar="TEXT", help="Text on which activations are collected.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the statistics; new or empty.")],
    sites: Sites = "mlp",
    tokens: Tokens = 65536,
    field: Field = None,
    split: Annotated[str | None, _Reading(help="Split of a dataset.", show_default="train")] = None,
    join: Joined = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 4,
    seed: Annotated[int, _Running(max=_MOST_SEED, help="Draws calibration sequences.")] = 0,
    device: Device = "auto",
    onload: Onload = False,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Writes the Gram matrices of MODEL's sites on a text, in one pass over the dense model.

    Example: `grail stats collect MODEL --calibration text.txt --output a/`
    """
    check_output(output)
    kinds = Recipe(sites=sites).sites
    text = _Text(calibration, tokens, sequence_length, batch_size, field, split, join, seed)
    text = text.checked(model)
    device = _computing(device)
    with _notes_said(CheckpointWarning):
        network, tokenizer = _load(model, "cpu" if onload else device, dtype, trust_remote_code)
    batches = text.batches(network, tokenizer)
    brought = device if onload else None
    collect_statistics(network, batches, kinds, output=output, onload=brought)
    typer.echo(f"statistics  {output}")


@stats.command("merge")
def stats_merge(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders that stats collect wrote.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; new or empty.")],
    debug: Debug = False,
) -> None:
    """Adds statistics of one model from different texts.

    Example: `grail stats merge a/ b/ -o c/`
    """
    merge_statistics(folders, output)
    typer.echo(f"statistics  {output}")


@dataclass(frozen=True)
class _Text:
    """A text as the command line names it, and how it becomes sequences of tokens."""

    source: str
    tokens: int | None
    sequence_length: int | None
    batch_size: int
    field: str | None
    split: Split | None
    join: Join | None
    seed: int | None = None
    option: str = "--calibration"

    def checked(self, model: str) -> "_Text":
        """The text with the split that is read; refused if its fault shows before MODEL is loaded.

        Raises:
            InputError: see `require_text`; the message begins with the option.
        """
        length = length_before_loading(model, self.sequence_length)
        with self._named():
            found = replace(self, split=split_of(self.source, self.split))
            if length is not None and self.tokens is not None and self.tokens < length:
                option = "--evaluate-tokens" if self.option == "--evaluate" else "--tokens"
                raise InputError(
                    f"{option} is {self.tokens}, less than one sequence of {length}; ask for more "
                    "tokens or for shorter sequences (--sequence-length)"
                )
            require_text(self.source, sequence_length=length, field=self.field, split=found.split)
        return found

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Begins the message of an error with the option that names the text."""
        try:
            yield
        except InputError as error:
            raise type(error)(f"{self.option}: {error}") from error

    def length(self, network: Any) -> int:
        """Tokens of a sequence."""
        return length_of_sequences(network, self.sequence_length)

    def batches(self, network: Any, tokenizer: Any) -> list[Tensor]:
        """The text as batches of tokens that the network's embedding has."""
        length = self.length(network)
        with self._named():
            batches = token_batches(
                self.source,
                tokenizer,
                tokens=self.tokens,
                sequence_length=length,
                batch_size=self.batch_size,
                seed=self.seed,
                field=self.field,
                split=self.split,
                join=self.join,
            )
            for batch in batches:
                check_token_ids(network, batch, tokenizer)
        require_causal(network, batches[0])
        return batches

    @property
    def reading(self) -> dict[str, Any]:
        """How the source was read, as far as that was said."""
        said = {"field": self.field, "split": self.split, "join": self.join, "seed": self.seed}
        return {name: value for name, value in said.items() if value is not None}

    def is_same_text(self, other: "_Text | None") -> bool:
        """Whether both read the same file, or the same split of a dataset."""
        if other is None or self.split != other.split:
            return False
        mine, its = Path(self.source), Path(other.source)
        if not (mine.exists() and its.exists()):
            return full_name(self.source) == full_name(other.source)
        if mine.samefile(its):
            return True
        both_files = mine.is_file() and its.is_file() and mine.stat().st_size == its.stat().st_size
        return both_files and file_hash(mine) == file_hash(its)


class _WikiText2(_Text):
    """The test split of WikiText-2 in windows of 2048 tokens, or of all that a model can read."""

    def length(self, network: Any) -> int:
        most = positions(network) or _WIKITEXT2_WINDOW
        if most < _WIKITEXT2_WINDOW:
            warnings.warn(
                f"perplexity on wikitext2 is of windows of {most} tokens, all that the model has "
                f"positions for; the literature's has {_WIKITEXT2_WINDOW}",
                stacklevel=2,
            )
        return min(most, _WIKITEXT2_WINDOW)


def _held_out(
    option: str,
    source: str,
    tokens: int | None,
    sequence_length: int | None,
    batch_size: int,
    field: str | None,
    split: str | None,
    join: Join | None,
) -> _Text:
    """A text for an evaluation; of a dataset the test split, else the validation split."""
    kind = _WikiText2 if is_wikitext2(source) and sequence_length is None else _Text
    chosen = HELD_OUT_SPLITS if split is None else split
    return kind(source, tokens, sequence_length, batch_size, field, chosen, join, option=option)


def _has_fields(source: str) -> bool:
    """Whether --field of the calibration means anything for a held-out text."""
    return not is_wikitext2(source) and not is_plain_text(source)


def _refuse_idle_options(ctx: typer.Context, statistics: Path | None, evaluate: str | None) -> None:
    """Raises InputError for options that were given and that nothing would read."""
    if evaluate is None:
        names = ("evaluate_tokens", "evaluate_field", "evaluate_split", "evaluate_join")
        if idle := _given(ctx, *names):
            raise InputError(f"{', '.join(idle)} is of the held-out text: give --evaluate with it")
    if statistics is not None:
        shared = () if evaluate else ("sequence_length", "field", "join")
        if idle := _given(ctx, "tokens", "split", *shared):
            raise InputError(
                f"{', '.join(idle)} is of the calibration text, which --statistics take the place "
                "of: leave it out"
            )


def _given(ctx: typer.Context, *names: str) -> list[str]:
    """The options of those names that were given on the command line."""
    return [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in names and _is_given(ctx, parameter.name)
    ]


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _prediction(keep: object, peak: float, seconds: float, text: str) -> str:
    return (
        f"Predicted for keep={keep}, {text}: peak memory {format_bytes(peak)}, time "
        f"{format_seconds(seconds)}."
    )


def _command_line(ctx: typer.Context) -> str:
    """The command with the options that were given, in a form that a shell runs again."""
    words = ["grail", ctx.command.name or ""]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if not _is_given(ctx, name):
            continue
        value = ctx.params[name]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(each)]
    return shlex.join(words)


def _name(model: str) -> str:
    """What the user calls the model, without the folders before it."""
    return Path(model).absolute().name


def _computing(device: str) -> str:
    """The device of that name in any case, or one that is here for "auto"."""
    device = device.lower()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    require_usable(device)
    return device


def _load(model: str, device: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    _say(f"Loading {model} …")
    return load_model(
        model,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )


@contextmanager
def _warnings_as_notes(kind: type[UserWarning] = UserWarning) -> Iterator[list[str]]:
    """Collects the library's own warnings, so that they reach the report and not only a screen."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kind)
        yield notes
    notes += [str(warning.message) for warning in caught]


@contextmanager
def _notes_said(kind: type[UserWarning] = UserWarning) -> Iterator[None]:
    """Prints the library's own warnings on stderr."""
    with _warnings_as_notes(kind) as notes:
        yield
    for note in notes:
        _say(f"note    {note}")


def _say(text: str) -> None:
    if current_processes().number == 0:
        typer.echo(text, err=True)


def page_or_note(report: Report) -> str | None:
    """The report as HTML, or a note that says why there is none."""
    if find_spec("matplotlib") is None:
        report.notes.append("No report.html: its plots need pip install 'grail-kernels[report]'.")
        return None
    return page(report)


def _print_result(report: Report, output: Path, as_json: bool) -> None:
    """Prints what is written by now; where that fails, the run has succeeded all the same."""
    try:
        if as_json:
            typer.echo(report.to_json(), nl=False)
        else:
            _print_report(report, output)
    except OSError as error:
        if _is_closed_pipe(error):
            raise
        _discard(sys.stdout)
        typer.echo(
            f"grail: the report cannot be printed ({error.strerror}); model and report are "
            f"complete in {output}",
            err=True,
        )


def _discard(stream: TextIO) -> None:
    """Lets what a stream still holds go nowhere: writing it would fail again at the exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _print_report(report: Report, output: Path) -> None:
    if report.evaluation:
        print_table(*evaluation_table(labelled(report.evaluation)))
    typer.echo(" ".join(headline(report)))
    if line := verdict(report):
        typer.echo(line)
    print_table(*stage_table(report.stages))
    if line := resumed_sentence(report):
        typer.echo(line)
    typer.echo(f"phases  {_phases(report.seconds)}")
    typer.echo(f"memory  {_parts(report.memory)}")
    if line := size_sentence(report):
        typer.echo(f"disk    {line}")
    for note in report.notes:
        typer.echo(f"note    {note}")
    typer.echo(f"model   {output}")
    for path in sorted(output.glob("report.*")):
        typer.echo(f"report  {path}")
    if (output / "README.md").is_file():
        typer.echo(f"card    {output / 'README.md'}")


def _print_inspection(inspection: Inspection) -> None:
    typer.echo(
        f"{inspection.name}: {format_count(inspection.parameters)} parameters, "
        f"{format_bytes(inspection.bytes)}"
    )
    print_table(
        ["sites", "count", "width of each"],
        [[site.kind, str(site.count), site.structure] for site in inspection.sites],
        words=3,
    )
    kinds = [site.kind for site in inspection.sites]
    print_table(
        ["keep", *kinds, "parameters", "bytes", "saved"],
        [
            [
                f"{saving.keep:g}",
                *(saving.widths[kind] for kind in kinds),
                format_count(saving.parameters),
                format_bytes(saving.bytes),
                f"{1 - saving.bytes / inspection.bytes:.0%}",
            ]
            for saving in inspection.savings
        ],
        words=1 + len(kinds),
    )
    peak, seconds = inspection.memory["peak"], inspection.seconds["total"]
    typer.echo(_prediction(inspection.keep, peak, seconds, f"{inspection.tokens:,} tokens"))
    typer.echo(f"memory  {_parts(inspection.memory)}")
    typer.echo(f"time    {_phases(inspection.seconds)}")


def _phases(seconds: dict[str, float]) -> str:
    parts = {phase: value for phase, value in seconds.items() if phase != "total"}
    return f"{format_seconds(seconds['total'])}: {_listed(parts)}"


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items())


def _parts(memory: dict[str, int]) -> str:
    """Sizes in words; a platform that does not tell its memory use leaves zeros, left out here."""
    known = {name.replace("_", " "): value for name, value in memory.items() if value}
    return ", ".join(f"{name} {format_bytes(value)}" for name, value in known.items())
