"""Training, evaluation and masked pretraining of the four modalities, with or without a pathway."""

from typing import TYPE_CHECKING

from .recipe import Recipe, describe_recipe, load_recipe, parse_assignment, shipped_recipes

__all__ = [
    "Recipe",
    "describe_recipe",
    "evaluate_checkpoint",
    "load_recipe",
    "parse_assignment",
    "pretrain",
    "preview",
    "shipped_recipes",
    "train",
]

if TYPE_CHECKING:
    from .run import evaluate_checkpoint, pretrain, preview, train
else:
    from ..lazy import attach

    __getattr__, __dir__ = attach(
        __name__, dict.fromkeys(("evaluate_checkpoint", "pretrain", "preview", "train"), "run")
    )
