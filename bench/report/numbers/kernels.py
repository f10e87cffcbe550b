"""Numbers of grail_kernels: times, errors and memory on a GPU and on a CPU."""

from bench.report.numbers.rows import Rows
from bench.tools.measuring import Row
from bench.tools.tables import markdown

# Launches of the shipped table among the trials.
SHIPPED = {"provider": "descriptors, chains in a flat loop", "chain": "256"}
CPU_CHANNELS = (576, 1536, 2048, 3072, 4096, 11008)
READ_OUT_CHANNELS = (576, 1536, 4096)
CALLS = (256, 1024, 2048)


class Grams:
    """Medians of a file of Gram matrices, one row a kernel, provider, metric, dtype and size."""

    def __init__(self, name: str, **columns: object) -> None:
        self._rows, self._columns = Rows(name), columns

    def row(self, provider: str, metric: str, channels: int, **columns: object) -> Row:
        """Returns the row of a provider; by default of the kernel `gram` in bf16."""
        wanted = {"kernel": "gram", "dtype": "bf16"} | self._columns | columns
        return self._rows.one(provider=provider, metric=metric, channels=channels, **wanted)

    def value(self, provider: str, metric: str, channels: int, **columns: object) -> float:
        """Returns the median: seconds of a time, eps of an error."""
        return float(self.row(provider, metric, channels, **columns)["p50"])

    def ms(self, provider: str, channels: int = 4096, **columns: object) -> float:
        """Returns the milliseconds of a call."""
        return 1000 * self.value(provider, "time", channels, **columns)

    def error(self, provider: str, channels: int = 4096, **columns: object) -> float:
        """Returns the largest error in eps."""
        return self.value(provider, "error", channels, **columns)

    def speed(self, rival: str, channels: int, provider: str = "grail", **columns: object) -> float:
        """Returns the time of a rival over that of a provider."""
        return self.ms(rival, channels, **columns) / self.ms(provider, channels, **columns)


class Kernels:
    """Numbers of the page on the kernels."""

    def __init__(self) -> None:
        self.gpu, self.cpu = Grams("gpu/gram.csv"), Grams("gram_cpu.csv")
        self.predicted = Grams("gram_predicted.csv", device="H100 (predicted)")
        self._trials, self._tuning = Rows("gpu/trials.csv"), Rows("gpu/tuning.csv")
        self._memory = Rows("memory_cpu.csv")
        self._ridge = {"gpu": Rows("gpu/ridge.csv"), "cpu": Rows("ridge_cpu.csv")}
        self._accuracy = {"gpu": Rows("gpu/accuracy.csv"), "cpu": Rows("accuracy_cpu.csv")}
        self._launching = Rows("launching.csv")
        self._absorb = Rows("gpu/absorb.csv")

    def memory(self, channels: int) -> float:
        """Returns the bytes of the packed accumulator over those of a dense fp32 matrix."""
        ours, dense = (
            self._memory.value("p50", provider=name, metric="accumulator", channels=channels)
            for name in ("grail", "dense")
        )
        return ours / dense

    def fp32_speeds(self) -> list[float]:
        """Returns the speeds over `addmm` in fp32 of wide matrices on a GPU, rising."""
        wide = (4096, 11008, 14336, 18944)
        return sorted(self.gpu.speed("addmm", channels, dtype="fp32") for channels in wide)

    def trial(self, tokens: int, channels: int) -> dict[str, float]:
        """Returns `speed` over `addmm`, `rate` in TF-eq, `error` in eps of the shipped tiles."""
        size = {"dtype": "bfloat16", "tokens": tokens, "channels": channels}
        (ours,) = (
            row
            for row in self._trials.where(**SHIPPED, **size)
            if row["config"].startswith("128 tokens")
        )
        seconds = float(ours["p50"])
        library = self._trials.values("p50", provider="addmm", **size)[-1]  # of the same run
        return {
            "speed": library / seconds,
            "rate": 2 * tokens * channels**2 / seconds / 1e12,
            "error": float(ours["error"]),
        }

    def predicted_value(self, metric: str, channels: int = 4096) -> float:
        """Returns a prediction for 65,536 tokens of bf16 on an H100: "speed" or "TF-eq"."""
        return self.predicted.value("model", metric, channels)

    def solve_speed(self, what: str, device: str = "gpu", channels: int = 11008) -> float:
        """Returns the speed of `grail` or `grail solve` over fp32 `solve` and a product."""
        ours, reference = (
            self._ridge[device].value("p50", provider=name, channels=channels)
            for name in (what, "reference")
        )
        return reference / ours

    def cpu_solves(self) -> list[float]:
        """Returns the times of the fp64 solve over the fp32 reference's on a CPU, rising."""
        sizes = {int(row["channels"]) for row in self._ridge["cpu"].all}
        return sorted(1 / self.solve_speed("grail solve", "cpu", size) for size in sizes)

    def solve_error(self, provider: str) -> float:
        """Returns the largest relative error of W' on a CPU."""
        return max(self._ridge["cpu"].values("error", provider=provider))

    def accuracy(
        self, column: str, device: str, provider: str, tokens: int = 2**20, **columns: object
    ) -> float:
        """Returns `error` in eps or `diagonal_bias` over tokens of positive mean, without sign."""
        rows = self._accuracy[device]
        return abs(rows.value(column, provider=provider, tokens=tokens, **columns))

    def host(self, phase: str = "whole") -> list[float]:
        """Returns microseconds of a call on the host, by case, in rising order."""
        return sorted(self._launching.values("p50", phase=phase))

    def operator(self) -> list[float]:
        """Returns the microseconds that the registered operator adds, by case, rising."""
        phases = ("whole", "through the operator")
        whole, through = (self._launching.values("p50", phase=phase) for phase in phases)
        return sorted(slow - fast for fast, slow in zip(whole, through, strict=True))

    def pointers(self) -> list[float]:
        """Returns the speeds of `pointers` over `tma` in fp32 up to 2048 channels, rising."""
        best: dict[str, dict[str, float]] = {}
        for row in self._tuning.all:
            kernel, _, form = row["row"].partition("/")
            if form in ("split/middle", "split/narrow") and kernel in ("gram", "gram_tma"):
                times = best.setdefault(row["shape"], {})
                if row["p50"]:
                    times[kernel] = min(times.get(kernel, float("inf")), float(row["p50"]))
        return sorted(times["gram_tma"] / times["gram"] for times in best.values())

    def fused_rate(self, channels: int = 11008) -> float:
        """Returns the TFLOP/s of bf16 of the fused absorb on a GPU: three products a result."""
        row = self._absorb.one(provider="fused", dtype="bfloat16", channels=channels)
        outputs, kept = int(row["outputs"]), int(row["kept"])
        return 3 * 2 * outputs * (channels - kept) * kept / float(row["p50"]) / 1e12

    def absorb_ms(self, provider: str, channels: int = 11008) -> float:
        """Returns the milliseconds of a way to absorb bf16 weights on a GPU."""
        row = self._absorb.one(provider=provider, dtype="bfloat16", channels=channels)
        return 1000 * float(row["p50"])

    def product_rate(self, channels: int = 11008) -> float:
        """Returns the TFLOP/s of the library's bf16 product xᵀx of 65,536 tokens on a GPU."""
        return 2 * 65_536 * channels**2 / self.gpu.value("mm", "time", channels) / 1e12

    def on_cpu(self) -> str:
        """Returns the table of whole calls on a CPU in fp32, as speeds over `addmm`."""
        rows = []
        for channels in CPU_CHANNELS:
            tokens = self.cpu.row("grail", "time", channels, dtype="fp32")["tokens"]
            speeds = (
                f"{self.cpu.speed('addmm', channels, name, dtype='fp32'):.2f}×"
                for name in ("grail", "numpy syrk", "scipy ssyrk")
            )
            rows.append([str(channels), tokens, *speeds])
        return markdown(["H", "tokens", "grail", "NumPy `x.T @ x`", "SciPy `ssyrk`"], rows)

    def read_outs(self) -> str:
        """Returns the table of calls with a read-out on a CPU, as speeds over `addmm`."""
        rows = [
            [
                f"{channels} {dtype}",
                *(f"{self._read_out(channels, dtype, call):.2f}×" for call in CALLS),
            ]
            for channels in READ_OUT_CHANNELS
            for dtype in ("fp32", "bf16")
        ]
        return markdown(["H, dtype", *(f"{call} a call" for call in CALLS)], rows)

    def _read_out(self, channels: int, dtype: str, call: int) -> float:
        return self.cpu.speed("addmm", channels, kernel="gram_readout", dtype=dtype, call=call)

    def bf16_products(self) -> list[float]:
        """Returns the times of `torch.mm` in bf16 over grail's on a CPU to H = 4096, rising."""
        return sorted(
            self.cpu.speed("mm", channels) for channels in CPU_CHANNELS if channels <= 4096
        )

    def cpu_errors(self, provider: str) -> list[float]:
        """Returns the errors in eps of bf16 on a CPU to H = 4096, rising."""
        return sorted(
            self.cpu.error(provider, channels) for channels in CPU_CHANNELS if channels <= 4096
        )
