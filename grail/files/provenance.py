"""Provenance of a result: command, date, version of the code, hashes of model and texts."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grail.errors import InputError
from grail.runtime.folder import file_hash
from grail.version import __version__

# In the order in which transformers looks for them, then files of other libraries.
_WEIGHTS = ("model", ".safetensors"), ("pytorch_model", ".bin"), ("", ".safetensors"), ("", ".gguf")
PACKAGE = Path(__file__).parents[1]  # grail


def provenance(command: str, source: str) -> dict[str, Any]:
    """Returns the origin of a report; texts are added by `text_source`.

    Args:
        command: the command line.
        source: the model as the user named it: a folder, a `.gguf` file or a hub name.

    Returns:
        command, date (UTC, ISO 8601), grail (version), commit (None if unknown), and model:
        {source, files: by name {bytes, sha256}}; no files if they cannot be found.
    """
    files = {path.name: _facts(path) for path in weight_files(source)}
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "grail": __version__,
        "commit": commit(),
        "model": {"source": source, "files": files},
    }


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def weight_files(source: str) -> list[Path]:
    """Lists the files from which transformers reads a model's weights.

    In a folder the first of: `model.safetensors` or the shards that its index names; the same for
    `pytorch_model.bin`; all `.safetensors`; all `.gguf`. Empty for a hub name that is not cached.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = _cached(source) or path
    by_kind = (_files_of(path, stem, ending) for stem, ending in _WEIGHTS)
    return next(filter(None, by_kind), [])


def _files_of(folder: Path, stem: str, ending: str) -> list[Path]:
    """Lists the file of that name, the shards of its index, or every file of that ending."""
    if not stem:
        return sorted(folder.glob(f"*{ending}"))
    if (whole := folder / f"{stem}{ending}").is_file():
        return [whole]
    index = folder / f"{stem}{ending}.index.json"
    with suppress(OSError, ValueError, KeyError, AttributeError):  # there is none, or it is damaged
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(path for name in names if (path := folder / str(name)).is_file())
    return []


def _cached(name: str) -> Path | None:
    """Returns the folder of a model of the hub on this machine, None if it is not cached."""
    with suppress(Exception):  # of many types, for names that cannot be one as well
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        return Path(found).parent if isinstance(found, str) else None
    return None


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns {bytes, sha256} of each safetensors file in a folder, by name."""
    return {path.name: _facts(path) for path in sorted(folder.glob("*.safetensors"))}


def require_unedited(folder: Path) -> None:
    """Raises InputError if a file of weights is not the one that a folder's report describes.

    A folder without a report, or with one of an earlier version, has no hashes and is accepted.
    """
    known: dict[str, dict[str, Any]] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = dict(json.loads((folder / "report.json").read_text(encoding="utf-8"))["files"])
    if not known:
        return
    found = hashes(folder)
    odd = [name for name in sorted(known | found) if known.get(name) != found.get(name)]
    if odd:
        how = "is another file than" if odd[0] in found else "is not there, which"
        raise InputError(
            f"{folder} was edited: {odd[0]} {how} its report.json lists; compress the model again, "
            "or export the edited model to a folder of its own (grail.export)"
        )


def text_source(source: str, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Describes a text: name, SHA-256 of the file if it is one, and SHA-256 of the tokens used.

    Tokens are hashed as little-endian int64 ids, row after row.
    """
    tokens = hashlib.sha256()
    for batch in batches:
        tokens.update(batch.cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    path = Path(source)
    return {
        "source": source,
        **({"sha256": file_hash(path)} if path.is_file() else {}),
        "tokens": sum(batch.numel() for batch in batches),
        "tokens_sha256": tokens.hexdigest(),
    }


def commit(package: Path = PACKAGE) -> str | None:
    """Returns the git commit of this code, with "+changes" if files differ; None if unknown."""
    with suppress(metadata.PackageNotFoundError, ValueError):
        installed = metadata.distribution("grail-kernels").read_text("direct_url.json")
        found = json.loads(installed or "{}").get("vcs_info", {}).get("commit_id")
        if found:
            return str(found)
    # A repository may only surround an installed package: it must track this package.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    head = _git(package, "rev-parse", "HEAD")
    return head and head + ("+changes" if changed else "")


def _git(package: Path, *arguments: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(package), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else None
    return None
