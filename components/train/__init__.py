"""The training stages: one loop over an objective, on Ray Train."""

from components.train.stages import distill, finetune, train_base

__all__ = ["distill", "finetune", "train_base"]
