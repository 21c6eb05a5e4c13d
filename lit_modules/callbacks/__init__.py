"""Callbacks, one idea a file."""

from lit_modules.callbacks.checkpoint import Checkpoint
from lit_modules.callbacks.compression import CompressionBaseline
from lit_modules.callbacks.continual import ContinualMatrix
from lit_modules.callbacks.elastic import ElasticTokens
from lit_modules.callbacks.ema import EMA
from lit_modules.callbacks.evaluation_row import EvaluationRow
from lit_modules.callbacks.free_space import FreeSpace
from lit_modules.callbacks.grow_tokens import GrowParameterTokens
from lit_modules.callbacks.loss_curve import LossCurve
from lit_modules.callbacks.monitors import Monitors
from lit_modules.callbacks.nonfinite import NonFinite
from lit_modules.callbacks.pictures import Pictures
from lit_modules.callbacks.predictions import ImagePredictions, TokenPredictions
from lit_modules.callbacks.preemption import Preemption
from lit_modules.callbacks.progress import Progress
from lit_modules.callbacks.sample import SampleText
from lit_modules.callbacks.summary import Summary
from lit_modules.callbacks.throughput import Throughput
from lit_modules.callbacks.watchdog import Watchdog

__all__ = [
    "EMA",
    "Checkpoint",
    "CompressionBaseline",
    "ContinualMatrix",
    "ElasticTokens",
    "EvaluationRow",
    "FreeSpace",
    "GrowParameterTokens",
    "ImagePredictions",
    "LossCurve",
    "Monitors",
    "NonFinite",
    "Pictures",
    "Preemption",
    "Progress",
    "SampleText",
    "Summary",
    "Throughput",
    "TokenPredictions",
    "Watchdog",
]
