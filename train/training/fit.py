"""`hsae.fit`: one model trained on vectors at hand, without a plan."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.device import pick_device
from hsae.cache.errors import UserError
from hsae.cache.reading.store import ActivationStore
from hsae.train.config.checked import checked
from hsae.train.config.run_config import RunConfig, StreamConfig
from hsae.train.model.trained_model import TrainedModel
from hsae.train.runs.metrics_log import MetricsLog
from hsae.train.runs.model_files import save_files
from hsae.train.training.folding import fold
from hsae.train.training.listener import Listener, ProgressBars
from hsae.train.training.loop import Journal, Trainee, check_run, run_steps
from hsae.train.training.sources import ArraySource, IterableSource, Source, StoreSource, as_vectors
from hsae.train.training.training_run import TrainingRun

Vectors = Tensor | NDArray[Any]
LEAST_STEPS = 1000
