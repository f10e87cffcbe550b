"""The calibration set: batches, samples, masks, and the stream that runs from block to block."""

from grail.calibrate.batches import Batch, model_inputs
from grail.calibrate.hidden_states import HiddenStates, OutputCache
from grail.calibrate.stream import Stream

__all__ = ["Batch", "HiddenStates", "OutputCache", "Stream", "model_inputs"]
