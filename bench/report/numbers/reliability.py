"""Numbers of the page on promises: faults, refusals, bad data, killed runs, damaged files."""

from bench.reliability.soak import WARM_UP, growth
from bench.report.numbers.counts import sentence
from bench.report.numbers.rows import Rows


class Reliability:
    """Numbers of the page on promises."""

    def __init__(self) -> None:
        self._faults, self._failsafe = Rows("faults.csv"), Rows("failsafe.csv")
        self._soak, self._flipping = Rows("soak.csv"), Rows("flipping.csv")
        self._killing = {name: Rows(f"{name}.csv") for name in ("killing", "killing_uneven")}
        self._compress = Rows("gpu/compress.csv")
        self._accuracy = Rows("gpu/accuracy.csv")
        self.warm_up = WARM_UP

    def counts(self) -> str:
        """Returns what one run of the tests injected, refused and measured, in words."""
        return sentence((row["what"], row["kind"], int(row["count"])) for row in self._faults.all)

    def corruptions(self) -> int:
        """Returns the number of ways to corrupt a problem."""
        return len({row["case"] for row in self._failsafe.all}) - 1  # one case is sound

    def repeats(self) -> int:
        """Returns the problems of each case."""
        (count,) = {int(row["problems"]) for row in self._failsafe.all}
        return count

    def outcome(self, kind: str, method: str = "grail") -> float:
        """Returns the share of the problems with an outcome, such as "refused" or "silent"."""
        return self.count(kind, method) / self.count("problems", method)

    def count(self, column: str, method: str = "grail") -> int:
        """Returns the problems that a method was given, or those with an outcome."""
        return int(sum(self._failsafe.values(column, method=method)))

    def soak(self, column: str) -> float:
        """Returns the last value of a column: minutes or rounds in all."""
        return float(self._soak.all[-1][column])

    def growth(self) -> float:
        """Returns the resident set in the last third over that in the first."""
        grown = growth([int(row["resident_bytes"]) for row in self._soak.all])
        if grown is None:
            raise LookupError(f"{self._soak.name} has too few rows")
        return grown

    def tensors(self) -> int:
        """Returns the most tensors that were alive at the end of a minute."""
        return max(int(row["tensors"]) for row in self._soak.all)

    def killed(self, name: str = "killing", **columns: str) -> int:
        """Returns the runs that were killed."""
        return len(self._killing[name].where(**columns))

    def same(self, name: str = "killing") -> int:
        """Returns the killed runs that ended with the bits of an undisturbed run."""
        return self.killed(name, **{"bitwise equal": "yes"})

    def damaged(self) -> int:
        """Returns the state files that were damaged."""
        return int(sum(self._flipping.values("trials")))

    def found(self) -> int:
        """Returns those whose damage was found."""
        return int(sum(self._flipping.values("found")))

    def alone(self, damage: str) -> str:
        """Returns how many of one kind of damage safetensors finds alone, "1 of 1000"."""
        row = self._flipping.one(damage=damage)
        return f"{row['found by safetensors alone']} of {row['trials']}"

    def million_tokens(self) -> float:
        """Returns the error in eps of a million tokens of bf16 in one launch on a GPU."""
        size = {"tokens": 2**20, "dtype": "bfloat16", "chain": 256}
        return self._accuracy.value("error", provider="grail", **size)

    def onload(self) -> str:
        """Returns the largest relative difference of a site's error with onload on a GPU."""
        row = self._compress.one(options="{'onload': True}")
        return row["worst_relative_difference_of_a_sites_error"].replace("e-0", "e-")
