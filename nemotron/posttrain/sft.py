"""Supervised fine-tuning as a stage: pre-training's rows and objective, on conversations.

Labels are the assistant's tokens alone; the counts of `Batch` then divide by those.
"""

from nemotron.train.pretraining import Pretraining


class Finetuning(Pretraining):
    """The stage that learns from conversations."""
