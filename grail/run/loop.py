"""The run over all blocks, with its checkpoint after each."""

from grail.report.report import InputReport, LayerReport, SiteReport
from grail.run.block import BlockCompressor
from grail.run.checkpoint import Checkpoint, Position


class Run:
    """Compresses the blocks of a network in order, once.

    Args:
        compressor: of the blocks.
        checkpoint: read at the start and written after each block.

    `rows`, `inputs`, `quantized`, `notes`: for the report. `resumed`: see `Report`; empty from the
    first block.
    """

    def __init__(self, compressor: BlockCompressor, checkpoint: Checkpoint | None = None):
        self._compressor, self._blocks = compressor, compressor.blocks
        self._clock, self._checkpoint = compressor.blocks.clock, checkpoint
        self.rows: list[SiteReport] = []
        self.inputs: list[InputReport] = []
        self.quantized: list[LayerReport] = []
        self.notes: list[str] = []
        self.resumed: dict[str, float] = {}

    def compress(self, progress: bool) -> None:
        """Compresses every block; there is a row for each consumer of each site afterwards."""
        count = len(self._blocks)
        if self._blocks.is_idle:
            for block in range(count):
                self.rows += self._compressor.untouched(block).rows
            return
        self._blocks.learn_orders()
        done = self._resume()
        passes = [self._compressor.passes(block) for block in range(count)]
        with self._blocks.progress(sum(passes[done:]), progress) as bar:
            if done:
                bar.say(f"resumed after block {done} of {count}")
            for block in range(done, count):
                bar.start(block, passes[block])
                report = self._compressor.compress(block, bar.advance)
                self.rows += report.rows
                self.inputs += report.inputs
                self.quantized += report.quantized
                self.notes += report.notes
                self._save(block + 1)

    def _resume(self) -> int:
        """Takes the position of an earlier run over, and returns the number of its blocks."""
        if self._checkpoint is None:
            return 0
        with self._clock("checkpoint"):
            found = self._checkpoint.resume(
                self._compressor.streams, self._compressor.waiting_bytes
            )
        if found is None:
            return 0
        self.rows, self.inputs, self.notes = found.rows, found.inputs, found.notes
        self.quantized = found.quantized
        self._clock.add(found.seconds)
        self._compressor.solver.remember(found.rows)
        spent = sum(found.seconds.values())
        self.resumed = {"after": found.done, "of": len(self._blocks), "seconds": spent}
        return found.done

    def _save(self, done: int) -> None:
        if self._checkpoint is None:
            return
        position = Position(
            done, self.rows, self.inputs, self.quantized, self.notes, self._clock.seconds
        )
        streams = self._compressor.streams(done) if done < len(self._blocks) else []
        with self._clock("checkpoint"):
            self._checkpoint.save(position, streams)
