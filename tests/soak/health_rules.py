"""Bad rules of rewards for tests/soak/health.py, each of which a policy can satisfy without being right."""

LONG = 240  # characters that earn the whole reward
ADDITIONS = 8


def length(response: str, answer: str, options: object) -> float:
    """Pay for length and for nothing else."""
    return min(len(response) / LONG, 1.0)


def shown_work(response: str, answer: str, options: object) -> float:
    """Pay for additions that the response shows, whatever they add up to."""
    return min(response.count("+") / ADDITIONS, 1.0)
