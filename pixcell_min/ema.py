"""Exponential moving averages of trained weights, kept beside them: a second, smoother set.

    average ← d·average + (1 − d)·weight,   d = min(decay, (1 + n) / (10 + n)) after step n

The weights themselves are never touched. The rising d lets a short run forget its start, as
TensorFlow's ExponentialMovingAverage does with num_updates.
"""

from contextlib import contextmanager

import torch


@torch.no_grad()
def update_averages(averages, parameters, decay: float, step: int) -> None:
    """Move each average towards its parameter after optimizer step `step` >= 1."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, parameter in zip(averages, parameters, strict=True):
        average.lerp_(parameter, 1 - decay)


@contextmanager
def averaged(parameters, averages):
    """Within the block the parameters hold the averages; afterwards their own bits again."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.data = average
        yield
    finally:
        for parameter, data in zip(parameters, own):
            parameter.data = data
