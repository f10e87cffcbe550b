"""Loads causal language models: a transformers folder, a hub name, or a GGUF file."""

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from grail.arguments import require_usable
from grail.errors import GrailError, InputError, ModelError, one_line
from grail.files import remote_code
from grail.files.alignment import align_weights
from grail.files.gguf_reading import read_once
from grail.files.saving import WIDTHS, load
from grail_kernels import check_kind

_PAGE = "docs/guides/compress.md#the-command"  # of errors

LENGTH = 1024  # tokens of a calibration sequence, if the model has positions for so many

# Models that count positions from after the padding token's: the first rows are unused.
POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
# Tensors in old checkpoints that networks compute or share: nothing is lost without them.
_HARMLESS = re.compile(
    r"rotary_emb\.|rope_freqs|inv_freq|position_ids$|masked_bias$|attn\.bias$|attention\.bias$"
    r"|lm_head\.(weight|decoder)|embed_out\.weight|\.pooler\."
)
_ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.spm", "*.tiktoken")


class CheckpointWarning(UserWarning):
    """A checkpoint holds weights that the network built from its configuration does not use."""


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer, ready to be compressed and exported.

    Reads dense checkpoints, and folders that `grail.export` or the command line wrote. Networks
    that `grail.save` wrote are read by `grail.load`.

    Args:
        source: a folder of `save_pretrained`, `grail.export` or the command line, a hub name, or
            the path of a `.gguf` file.
        dtype: dtype of the weights; the checkpoint's own if None (fp32 for GGUF).
        device: where the model goes.
        gguf_file: name of the GGUF file inside `source`, if that is a folder or a hub name.
        trust_remote_code: runs Python code that comes with the model or its tokenizer, with the
            rights of the caller. Without it such a model is refused; nothing is asked.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        InputError: `source` is the path of a file that is not there, or not GGUF.
        ModelError: model or tokenizer cannot be read, weights are missing or have other shapes, it
            is no decoder-only language model, or it needs code of its own.

    Warns:
        CheckpointWarning: weights of the checkpoint are not used.
    """
    check_kind("source", source, (str, Path), "a path or a hub name")
    device = require_usable(device)
    where, gguf_file = _locate(str(source), gguf_file)
    if find_spec("transformers") is None:
        raise ModelError(
            "loading a model needs transformers: pip install 'grail-kernels[llm]'",
            page="docs/index.md#install",
        )
    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    options["trust_remote_code"] = trust_remote_code
    if gguf_file is None:
        _require_language_model(source, where, trust_remote_code)
    with nullcontext() if gguf_file is None else read_once():
        tokenizer = _read_tokenizer(source, where, options)
        with _refusing(source, trust_remote_code):
            # Weights of other shapes are refused below, by name.
            model, found = read_model(where, dtype, ignore_mismatched_sizes=True, **options)
    _require_same_weights(source, found)
    if gguf_file is not None:
        model = _without_quantiser(model)
    return model.to(device).eval(), tokenizer


def read_model(
    where: str | Path,
    dtype: torch.dtype | None = None,
    *,
    ignore_mismatched_sizes: bool = False,
    **options: Any,
) -> tuple[Any, Mapping[str, Collection[Any]]]:
    """Reads a causal language model, and transformers' account of its weights.

    The account has `missing_keys`, `unexpected_keys` and `mismatched_keys` (name, shape in the
    file, shape in the network). It is empty for blocks of different widths, which `grail.load`
    reads and checks itself.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    options.setdefault("trust_remote_code", False)  # None would ask on standard input
    if not (Path(where) / WIDTHS).is_file():
        ours = remote_code.is_written(where)
        if ours and options["trust_remote_code"]:  # code that was edited is run as it is
            ours = remote_code.edited(where) is None
        read: Any = remote_code.load if ours else AutoModelForCausalLM.from_pretrained
        loaded: Any = read(
            where,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **options,
        )
        align_weights(loaded[0])
        return loaded
    config = AutoConfig.from_pretrained(where, trust_remote_code=options["trust_remote_code"])
    model: Any = load(where, lambda: AutoModelForCausalLM.from_config(config, **options))
    for parameter in model.parameters():
        # Buffers stay: rotary frequencies are not weights.
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    if model.can_generate():
        with suppress(OSError):  # there is none
            model.generation_config = GenerationConfig.from_pretrained(where)
    return model, {}


def runs_own_code(model: Any) -> bool:
    """Returns True if a model's class is trusted code that came with it."""
    return type(model).__module__.startswith("transformers_modules")


def length_before_loading(source: str, wanted: int | None) -> int | None:
    """Reads the tokens of a calibration sequence from the configuration; None if it has none."""
    if wanted is not None or not (Path(source) / "config.json").is_file():
        return wanted
    from transformers import AutoConfig

    with suppress(Exception):  # loading the model will name the fault
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return min(LENGTH, _positions(config) or LENGTH)
    return None


def positions(model: Any) -> int | None:
    """Returns the number of tokens that a model has positions for; None if it is not known."""
    return _positions(getattr(model, "config", None))


def _positions(config: Any) -> int | None:
    found = getattr(config, "max_position_embeddings", None)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        return None  # XLNet has −1
    if config.model_type in POSITIONS_AFTER_PADDING:
        found -= (config.pad_token_id or 0) + 1
    return found


def length_of_sequences(model: Any, wanted: int | None = None) -> int:
    """Returns the tokens of a calibration sequence: 1024, or fewer if a model has fewer positions.

    Raises:
        InputError: more are wanted than the model has positions for.
    """
    most = positions(model)
    if wanted is None:
        return min(LENGTH, most or LENGTH)
    if most is not None and wanted > most:
        raise InputError(
            f"the model reads sequences of at most {most} tokens, not of {wanted}; give "
            f"--sequence-length {most}"
        )
    return wanted


def _locate(source: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Splits the path of a GGUF file into folder and name, and refuses what is no model."""
    if not source.strip():
        raise InputError(
            "the name of the model is empty; give a transformers folder, a hub name or a .gguf file"
        )
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{source}: no such GGUF file; give the path of a .gguf file")
        return str(path.parent), path.name
    if path.is_file():
        raise InputError(
            f"{source} is a file that does not end in .gguf; "
            "give a transformers folder, a hub name or a .gguf file"
        )
    if (path / _ADAPTER).is_file():
        raise ModelError(
            f"{source} holds an adapter of PEFT, no model of its own; load it, call "
            "merge_and_unload(), and save the merged model with save_pretrained",
            page=_PAGE,
        )
    if path.is_dir() and gguf_file is None and not (path / "config.json").is_file():
        raise ModelError(
            f"{source} is not a model: the folder has no config.json; give a folder that "
            "save_pretrained wrote, or the path of a .gguf file",
            page=_PAGE,
        )
    # The hub client takes most of a minute to give up on a mistyped path; names have one slash.
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or len(path.parts) > 2):
        raise ModelError(
            f"{source}: no such folder; give a transformers folder, a hub name or a .gguf file",
            page=_PAGE,
        )
    return source, gguf_file


def _require_language_model(source: str | Path, where: str, trusted: bool) -> None:
    """Raises ModelError if a configuration is not of a decoder-only language model.

    A configuration that cannot be read is refused later, by loading.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trusted)
    except Exception:  # of no common type, see _refusing
        return
    if config.is_encoder_decoder:
        raise ModelError(
            f"{source} is an encoder-decoder ({config.model_type}), and load_model and the command "
            "line take decoder-only language models; compress it in Python (grail.compress)"
        )
    own = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" not in own and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{source} is no language model: transformers has no causal language model of the type "
            f"{config.model_type}; compress other networks in Python (grail.compress)"
        )


def _read_tokenizer(source: str | Path, where: str, options: dict[str, Any]) -> Any:
    """Reads the tokenizer; an error names it only if the model's configuration can be read.

    Without files transformers invents some tokenizers, which have special tokens alone.
    """
    from transformers import AutoConfig, AutoTokenizer

    failure, reason = None, "it would have special tokens alone"
    config: Any = remote_code.stock_config(where) if remote_code.is_written(where) else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, config=config, **options)
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
    except Exception as error:  # of no common type, see _refusing
        failure, reason = error, one_line(error)
    with _refusing(source, options["trust_remote_code"]):
        config = config or AutoConfig.from_pretrained(where, **options)
        if failure is not None and _needs_code(failure):
            raise failure
    if Path(where).is_dir() and not any(Path(where).glob(p) for p in _TOKENIZER_FILES):
        reason = "no file of one is there"
    raise ModelError(
        f"{source}: the model's configuration can be read ({config.model_type}), but its tokenizer "
        f"is missing or damaged: {reason}; put the tokenizer's files there, such as tokenizer.json "
        "and tokenizer_config.json (tokenizer.save_pretrained)",
        page=_PAGE,
    ) from failure


@contextmanager
def _refusing(source: str | Path, trusted: bool) -> Iterator[None]:
    """Turns any error of a reader into ModelError.

    Readers have no common error type (OSError, ValueError, KeyError, SafetensorError,
    ImportError …).
    """
    try:
        yield
    except GrailError:
        raise
    except Exception as error:
        if _needs_code(error) and not trusted:
            raise ModelError(
                f"{source} needs Python code of its own; read "
                "that code, then give --trust-remote-code (load_model(trust_remote_code=True)), "
                "which runs it with your rights",
                page=_PAGE,
            ) from error
        reason = one_line(error)
        if Path(source).exists():
            said = "holds no causal language model that transformers can read"
        else:
            said = "is no local folder, and no model of that name could be fetched"
        raise ModelError(f"{source} {said}: {reason}", page=_PAGE) from error


def _needs_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _require_same_weights(source: str | Path, found: Mapping[str, Collection[Any]]) -> None:
    """Raises ModelError for weights that are missing, and warns of weights that are not used.

    transformers fills missing weights with random numbers and only warns.
    """
    if missing := found.get("missing_keys"):
        raise ModelError(
            f"{source}: the checkpoint lacks {len(missing)} weight(s) of its architecture, "
            f"such as {min(missing)}; give a complete checkpoint of a causal language model"
        )
    if mismatched := found.get("mismatched_keys"):
        name, stored, built = min(mismatched)
        raise ModelError(
            f"{source}: {len(mismatched)} weight(s) have another shape than config.json gives "
            f"them, such as {name}: {tuple(stored)} in the checkpoint, {tuple(built)} by "
            "config.json; give the configuration that the weights were saved with"
        )
    names = [name for name in found.get("unexpected_keys", ()) if not _HARMLESS.search(name)]
    if names:
        warnings.warn(
            f"{source} holds {len(names)} weight(s) that the network built from config.json does "
            f"not use, such as {min(names)}: they are left out",
            CheckpointWarning,
            stacklevel=3,
        )


def _without_quantiser(model: Any) -> Any:
    """Returns the same weights in a model that `save_pretrained` accepts.

    A model read from GGUF is dequantised, but keeps a quantiser that refuses to save.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model).from_pretrained(
        None, config=config, state_dict=model.state_dict(), dtype=model.dtype
    )
    plain.generation_config = model.generation_config
    return plain
