"""The commands: they read arguments, call the library and print. Nothing is computed here.

Every `GrailError` ends as one sentence on stderr and exit code 2, Ctrl-C as exit code 130. What a
person reads on the way (progress, predictions) goes to stderr, results go to stdout.
"""

import json
import shlex
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor
from typer.core import TyperGroup

from grail import __version__, checkpoint, select
from grail.calibration import load_texts, token_batches
from grail.clock import Stages
from grail.collect import Collected
from grail.collect import collect as collect_statistics
from grail.collect import merge as merge_statistics
from grail.console import print_table as _print_table
from grail.distributed import launched, ranks
from grail.errors import GrailError, InputError
from grail.evaluate import evaluate as evaluate_model
from grail.fit import Auto, Damping, Toward
from grail.folder import check_output
from grail.formatting import format_bytes, format_count, format_seconds
from grail.gram import NonFinite
from grail.memory import ran_out
from grail.models import length_of_sequences, load_model
from grail.onload import require_usable
from grail.options import Compensation, Options
from grail.page import page
from grail.plan import KEEPS, Inspection
from grail.plan import inspect as inspect_model
from grail.provenance import provenance
from grail.report import Report, strict_json
from grail.sensitivity import require_single_channels
from grail.sites import find
from grail.summary import evaluation_table, headline, labelled, size_sentence, stage_table, verdict
from grail.workflow import IMPORTING, LOADING, Study, attribute, text_of

_DEBUG = "grail.debug"

# Options that belong together stand together in the help text.
_Restoring = partial(typer.Option, rich_help_panel="Restoring")
_Comparing = partial(typer.Option, rich_help_panel="Comparing on held-out text")
_Running = partial(typer.Option, rich_help_panel="Running")

# By whether weights and biases are fitted.
_COMPENSATIONS: dict[tuple[bool, bool], bool | Compensation] = {
    (True, False): "weights",
    (True, True): "both",
    (False, True): "bias",
    (False, False): False,
}


def _number_or_auto(text: str) -> float | Auto:
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto") from error


class Commands(TyperGroup):
    """Turns an error that the user can act on into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return super().invoke(ctx)
        except GrailError as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            typer.echo(f"grail: {error}", err=True)
            raise typer.Exit(2) from error
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            advice = "lower --batch-size or --sequence-length, or choose --device cpu"
            typer.echo(f"grail: out of memory; no output was written: {advice}.", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("\ngrail: interrupted; no output was written.", err=True)
            raise typer.Exit(130) from error


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
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _Running(help="Dtype of the weights; auto is the checkpoint's own."),
]
SequenceLength = Annotated[
    int | None,
    _Running(
        min=2,
        help="Tokens in a sequence; nothing is padded.",
        show_default="1024, or all that the model has positions for",
    ),
]
BatchSize = Annotated[int, _Running(min=1, help="Sequences that go through the model at a time.")]
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
            help="Text on which activations are collected: .txt, .jsonl or .parquet (field "
            "'text'), or a dataset name. Take text like the text the model is for.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="In its place, a folder that `grail stats` wrote; with --open-loop."),
    ] = None,
    keep: Annotated[
        float,
        typer.Option(help="Share of the channels or heads that stays, in (0, 1]."),
    ] = 0.7,
    sites: Annotated[
        str,
        typer.Option(
            help="What becomes narrower: mlp, heads, or mlp,heads; of mixtures experts, "
            "shared_experts."
        ),
    ] = "mlp",
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
    tokens: Annotated[
        int, typer.Option(help="Calibration tokens. More is better up to about 10⁵.")
    ] = 65536,
    evaluate: Annotated[
        str | None,
        _Comparing(
            metavar="TEXT",
            help="Held-out text: compares the dense, the pruned and the restored model on it; "
            "with --onload on the CPU.",
        ),
    ] = None,
    evaluate_tokens: Annotated[int, _Comparing(help="Held-out tokens to predict.")] = 16384,
    baseline: Annotated[
        bool,
        _Comparing(help="With --evaluate: also measure plain pruning, in a run of its own."),
    ] = True,
    compensate: Annotated[
        bool,
        _Restoring(help="Rebuild lost channels from kept ones; without, plain pruning."),
    ] = True,
    bias: Annotated[
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
    damping: Annotated[
        Damping,
        _Restoring(help="The ridge damps all channels of a site alike, or each by its energy."),
    ] = "site",
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
    seed: Annotated[int, _Running(help="Draws calibration sequences and random scores.")] = 0,
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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compresses MODEL and writes a plain folder that transformers loads.

    Example: `grail compress MODEL --keep 0.7 --calibration text.txt --output out/`

    Add `--evaluate heldout.txt` to see what it cost: perplexity dense, pruned and restored.
    """
    command = {name: str(value) for name, value in ctx.params.items()}
    options = Options(
        keep=keep,
        sites=sites,
        selector=selector,
        compensate=_COMPENSATIONS[compensate, bias],
        alpha=alpha,
        toward=toward,
        damping=damping,
        drift_correction=drift_correction,
        correct_attention=correct_attention,
        token_weights="auto" if token_weights is None else token_weights,
        closed_loop=closed_loop,
        multiple=multiple,
        seed=seed,
        non_finite=non_finite,
    )
    device = ctx.with_resource(launched(device))
    processes = ranks()
    written = output / "report.json"
    done = resume_dir is not None and checkpoint.announced(resume_dir, command)
    done = done and written.exists()  # by a run that was killed right after it had done all
    processes.require_equal("whether the run is done", done)
    if resume_dir is not None and done:
        if processes.number == 0:
            checkpoint.clear(resume_dir)
            _print_result(Report.from_json(written.read_text(encoding="utf-8")), output, as_json)
        return
    if (calibration is None) == (statistics is None):
        raise InputError("give either --calibration or --statistics")
    if uneven and (statistics or onload or processes.count > 1):
        raise InputError(
            "--uneven runs the whole model on calibration text, in one process: give it no "
            "--statistics, and no --onload"
        )
    if uneven and not options.fits_weights:
        raise InputError(
            "--uneven measures what sites cost once compensated: leave --compensate on"
        )
    if statistics and closed_loop:
        raise InputError("--statistics are of the dense network: give --open-loop with them")
    check_output(output)
    for source in filter(None, (calibration, evaluate)):
        next(load_texts(source), None)
    device = _computing(device)
    load = partial(_load, model, "cpu" if onload else device, dtype)

    stages = Stages()
    with stages(IMPORTING), suppress(ImportError):  # once, where the network is loaded repeatedly
        import_module("transformers.modeling_utils")
    with stages(LOADING):
        network, tokenizer = load()
    length = length_of_sequences(network, sequence_length)
    cut = partial(token_batches, sequence_length=length, batch_size=batch_size)
    with _warnings_as_notes() as notes:
        batches: list[Tensor] | Collected = (
            cut(calibration, tokenizer, tokens=tokens, seed=seed)
            if calibration
            else Collected(str(statistics))
        )
        heldout = cut(evaluate, tokenizer, tokens=evaluate_tokens) if evaluate else []
    if evaluate and evaluate == calibration:
        notes.append("The held-out text is the calibration text: the comparison is too kind.")
    if uneven:
        require_single_channels(find(network, options.sites), options)
    origin = provenance(_command_line(ctx), model)
    origin["calibration"] = text_of(calibration or str(statistics), batches)
    if evaluate:
        origin["evaluation"] = text_of(evaluate, heldout)
    study = Study(
        network,
        lambda: load()[0],
        tokenizer,
        batches,
        heldout,
        stages,
        onload=device if onload else None,
        say=_say,
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
        options = study.uneven(options, resume_dir)
        notes.append(
            f"Blocks keep more or less, {keep:g} of all together, by what narrowing each of them "
            'costs. Rows without "uneven" have even widths.'
        )
    _say("Compressing …")
    report = study.run(options, resume_dir)
    attribute(report, _name(model), origin)
    report.notes += notes
    _say("Writing, and loading again to compare …")
    with processes.together():
        if processes.number > 0:
            return  # the first one writes, and the others wait for it
        if resume_dir is not None:
            checkpoint.announce(resume_dir, command)
        study.write(report, prediction, output, page_or_note)
        if resume_dir is not None:
            checkpoint.clear(resume_dir)
    _print_result(report, output, as_json)


@app.command()
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(metavar="TEXT", help="Held-out text, see compress.")],
    tokens: Annotated[
        int | None, typer.Option(help="How many tokens to predict.", show_default="all")
    ] = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measures perplexity and size of MODEL on a text.

    Example: `grail evaluate out/ --text heldout.txt`
    """
    next(load_texts(text), None)
    network, tokenizer = _load(model, _computing(device), dtype)
    batches = token_batches(
        text,
        tokenizer,
        tokens=tokens,
        sequence_length=length_of_sequences(network, sequence_length),
        batch_size=batch_size,
    )
    row = evaluate_model(network, batches)
    if as_json:
        typer.echo(strict_json(asdict(row)))
    else:
        _print_table(*evaluation_table({_name(model): row}))
        typer.echo(f"{row.tokens:,} predicted tokens")


@app.command()
def inspect(
    model: Model,
    sites: Annotated[
        str | None, typer.Option(help="Kinds of sites, see compress.", show_default="all")
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="Ratio to tell about; give it several times for several.",
            show_default=", ".join(map(str, KEEPS)),
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens of the predicted run.")] = 65536,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 4,
    device: Device = "auto",
    onload: Onload = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows the sites of MODEL, what each keep ratio saves, and what a run would cost.

    Nothing is changed or written. Example: `grail inspect MODEL --sites mlp --tokens 24576`
    """
    device = _computing(device)
    network, _ = _load(model, "cpu" if onload else device, dtype)
    first = keep[0] if keep else 0.7
    inspection = inspect_model(
        network,
        options=Options(keep=first, sites=sites) if sites else None,
        keep=first,
        keeps=keep or KEEPS,
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
    sites: Annotated[str, typer.Option(help="What will become narrower, see compress.")] = "mlp",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 65536,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = 4,
    seed: Annotated[int, _Running(help="Draws calibration sequences.")] = 0,
    device: Device = "auto",
    onload: Onload = False,
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Writes the Gram matrices of MODEL's sites on a text, in one pass over the dense model.

    Example: `grail stats collect MODEL --calibration text.txt --output a/`
    """
    check_output(output)
    device = _computing(device)
    network, tokenizer = _load(model, "cpu" if onload else device, dtype)
    batches = token_batches(
        calibration,
        tokenizer,
        tokens=tokens,
        sequence_length=length_of_sequences(network, sequence_length),
        batch_size=batch_size,
        seed=seed,
    )
    brought = device if onload else None
    collect_statistics(network, batches, sites.split(","), output=output, onload=brought)
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
        source = ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
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
    """The device of that name, or one that is here for "auto"."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    require_usable(device)
    return device


def _load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    _say(f"Loading {model} …")
    return load_model(
        model, dtype=None if dtype == "auto" else getattr(torch, dtype), device=device
    )


@contextmanager
def _warnings_as_notes() -> Iterator[list[str]]:
    """Collects the library's own warnings, so that they reach the report and not only a screen."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield notes
    notes += [str(warning.message) for warning in caught]


def _say(text: str) -> None:
    if ranks().number == 0:
        typer.echo(text, err=True)


def page_or_note(report: Report) -> str | None:
    """The report as HTML, or a note that says why there is none."""
    if find_spec("matplotlib") is None:
        report.notes.append("No report.html: its plots need pip install 'grail-kernels[report]'.")
        return None
    return page(report)


def _print_result(report: Report, output: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        _print_report(report, output)


def _print_report(report: Report, output: Path) -> None:
    if report.evaluation:
        _print_table(*evaluation_table(labelled(report.evaluation)))
    typer.echo(" ".join(headline(report)))
    if line := verdict(report):
        typer.echo(line)
    _print_table(*stage_table(report.stages))
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
    _print_table(
        ["sites", "count", "width of each"],
        [[site.kind, str(site.count), site.structure] for site in inspection.sites],
        words=3,
    )
    kinds = [site.kind for site in inspection.sites]
    _print_table(
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
