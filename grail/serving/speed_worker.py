"""Measures the speed of one file; a program for a process of its own.

`python -m grail.serving.speed_worker` reads requests from standard input and answers on standard
output, each a line of JSON. The first request says what to load, each other one asks for a round at
a batch size. An answer is {"result": …}, {"refused": a sentence for the user} or {"failed": the
runtime's message}, which is empty if it stands on standard error, where all that libraries print
goes.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from grail.serving.speed_engines import ENGINES, Explained, Refused


def main() -> None:
    """Answers requests until standard input is closed."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers each request; ends after one that failed."""
    gc.disable()  # it would run in the middle of what is timed
    engine: Any = None

    def load(kind: str, **work: Any) -> dict[str, str]:
        nonlocal engine
        engine = ENGINES[kind](**work)
        return {"runtime": engine.runtime, "form": engine.form}

    def measure(batch: int) -> dict[str, tuple[float, float]]:
        gc.collect()
        return engine.measure(batch)

    for line in requests:
        answer = _answer(load if engine is None else measure, json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)
        if "result" not in answer:
            return


def _answer(call: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": call(**request)}
    except Explained:
        return {"failed": ""}
    except Exception as error:  # of any runtime
        if isinstance(error, Refused) or type(error).__module__.startswith("grail"):
            return {"refused": str(error)}
        return {"failed": " ".join(str(error).split()) or type(error).__name__}


if __name__ == "__main__":
    main()
