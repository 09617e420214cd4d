"""Training, evaluation and masked pretraining of the four modalities, with a pathway or without."""

from .recipe import Recipe, load_recipe, parse_assignment, shipped_recipes
from .run import evaluate_checkpoint, pretrain, train

__all__ = [
    "Recipe",
    "evaluate_checkpoint",
    "load_recipe",
    "parse_assignment",
    "pretrain",
    "shipped_recipes",
    "train",
]
