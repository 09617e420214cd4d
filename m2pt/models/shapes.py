"""A check of shapes whose errors say what was expected."""

from torch import Tensor


def require_shape(argument: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise a TypeError unless it is a tensor, and a ValueError unless it has the expected shape.

    A string in `expected` names a size that is free.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(tensor).__name__}")
    fits = len(tensor.shape) == len(expected) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{argument}: expected shape ({', '.join(map(str, expected))}), got {tuple(tensor.shape)}")
