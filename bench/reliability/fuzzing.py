"""A fuzz target for the reader of state files, by atheris (libFuzzer with coverage of Python).

    pip install atheris
    python -m bench.reliability.fuzzing -runs=100000 -max_total_time=60

Whatever bytes it is given, the reader answers with a state or with a StateError. Each input is read
twice: as a file, and as what follows the hash in a header that is signed, so that what lies behind
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

    with atheris.instrument_imports(include=["grail.state"]):
        from grail.runtime import state

    import torch

    from grail.errors import StateError

    data_bytes = torch.arange(3.0).numpy().tobytes()
    start = state._START + state._NO_HASH.encode()
    with tempfile.TemporaryDirectory() as folder:
        path, corpus = Path(folder) / "fuzz.state", Path(folder) / "corpus"
        corpus.mkdir()
        state.write(path, "test", {"name": "x"}, {"x": torch.arange(3.0)})
        whole = path.read_bytes()
        (corpus / "file").write_bytes(whole)
        (corpus / "header").write_bytes(whole[8 + len(start) : -len(data_bytes)])

        def read(data: bytes) -> None:
            header = start + data
            signed = state._signed(len(header).to_bytes(8, "little") + header) + data_bytes
            for content in (data, signed):
                path.write_bytes(content)
                with suppress(StateError):
                    state.read(path, "test")

        atheris.Setup([sys.argv[0], *limits, str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
