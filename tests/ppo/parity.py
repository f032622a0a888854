"""A reward that a model without training earns about half of the time."""


def even(response: str, answer: str, options: tuple[str, ...]) -> float:
    """1 for a response with an even number of characters."""
    return float(len(response) % 2 == 0)
