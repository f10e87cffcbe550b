"""A fuzz target for the reader of state files, by atheris (libFuzzer with coverage of Python).

    pip install atheris
    python -m bench.reliability.fuzzing -runs=100000 -max_total_time=60

Whatever bytes it is given, the reader answers with a state or with a StateError. Each input is read
twice: as a file, and as the description in a sound file, signed so that the code after the check of
the hash is reached.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from bench.tools.measuring import command_line


def main() -> None:
    """Fuzzes until libFuzzer's limits are met; an exception of another kind ends it."""
    _, limits = command_line(
        __doc__,
        writes="nothing",
        takes="until libFuzzer's limits are met: -max_total_time=SECONDS, -runs=NUMBER",
    ).parse_known_args()
    fuzz(limits)


def fuzz(limits: list[str]) -> None:
    """Fuzzes the reader, with options of libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["grail.runtime.state"]):
        from grail.runtime import state

    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    from grail.errors import StateError

    tensors = {"x": torch.arange(3.0)}
    with tempfile.TemporaryDirectory() as folder:
        path, corpus = Path(folder) / "fuzz.state", Path(folder) / "corpus"
        corpus.mkdir()
        state.write(path, "test", {"name": "x"}, tensors)
        (corpus / "file").write_bytes(path.read_bytes())
        with safe_open(path, "pt") as file:
            (corpus / "description").write_text(file.metadata()["state"].partition(" ")[2])

        def read(data: bytes) -> None:
            description = data.decode("utf-8", "replace")
            for content in (data, save(tensors, state.signed(description))):
                path.write_bytes(content)
                with suppress(StateError):
                    state.read(path, "test")

        atheris.Setup([sys.argv[0], *limits, str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
