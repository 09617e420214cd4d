"""A check of shapes that says what was expected."""

from torch import Tensor


def require_shape(argument: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise a ValueError unless `tensor` has the expected shape, in which a string names a size that is free."""
    fits = len(tensor.shape) == len(expected) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{argument}: expected shape ({', '.join(map(str, expected))}), got {tuple(tensor.shape)}")
