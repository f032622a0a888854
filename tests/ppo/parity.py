"""Rewards that a model without training earns about half of the time."""


def even(response: str, answer: str, options: tuple[str, ...]) -> float:
    """1 for a response with an even number of characters."""
    return float(len(response) % 2 == 0)


def as_told(response: str, answer: str, options: tuple[str, ...]) -> float:
    """1 where the answer is ``all``, 0 where it is ``none``, else `even`."""
    return {"all": 1.0, "none": 0.0}.get(answer, even(response, answer, options))


def broken(response: str, answer: str, options: tuple[str, ...]) -> float:
    """Raise an error."""
    raise NameError("no_such_name")
