"""Training a policy and measuring it: `train`, `evaluate`, `trainable_report`, and their command line.

loop.py        the training loop itself, readable from top to bottom
batches.py     which samples step k sees, and its random numbers: functions of (seed, k) and nothing else
optim.py       AdamW, the learning-rate schedule, averaged weights, the table of what is trainable
run.py         what happens around a step: logging, evaluating, saving, resuming, stopping
checkpoint.py  checkpoints that are whole or absent, the log and its plot
evaluation.py  a policy in environments that run as a batch; environments.py: made to fit it; video.py: films
__main__.py    the command line, which `accelerate launch -m minivla.training` takes to many processes
"""

from minivla.training.evaluation import Evaluation, evaluate
from minivla.training.loop import TrainResult, train
from minivla.training.optim import trainable_report

__all__ = ["Evaluation", "TrainResult", "evaluate", "train", "trainable_report"]
