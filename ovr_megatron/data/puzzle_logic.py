"""Text logic whose traces show backward chaining, subgoals, backtracking and verification, each of them always."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from random import Random

from ovr_megatron.data.puzzle_kind import Kind, Number, Params, Puzzle, box
from ovr_megatron.data.schema import BOX_REQUEST, TextPart

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")

MAX_FAILED = 2  # failed walks that a countdown trace tells
Order = tuple[str, ...]
Clue = tuple[str, str, str]  # (relation, who, whom)
RELATIONS = {
    "left": "{} stands somewhere left of {}",
    "beside": "{} stands beside {}",
    "apart": "{} does not stand beside {}",
}
MUTUAL = ("beside", "apart")


def _holds(clue: Clue, order: Order) -> bool:
    relation, who, whom = clue
    distance = order.index(whom) - order.index(who)
    return {"left": distance > 0, "beside": abs(distance) == 1, "apart": abs(distance) > 1}[relation]


@functools.cache
def _orders(people: int) -> tuple[Order, ...]:
    return tuple(itertools.permutations(NAMES[:people]))


@functools.cache
def _fit(clue: Clue, people: int) -> int:
    """The orders that fit ``clue``, as bits."""
    return sum(1 << i for i, order in enumerate(_orders(people)) if _holds(clue, order))


def _fit_all(clues: Iterable[Clue], people: int) -> int:
    every = (1 << len(_orders(people))) - 1
    return functools.reduce(operator.and_, (_fit(clue, people) for clue in clues), every)


def draw_ordering(rng: Random, params: Params) -> tuple[Order, tuple[Clue, ...]]:
    """People in a row, and the clues that together leave this order; without any one of them there are more."""
    people = params["people"]
    number = rng.randrange(len(_orders(people)))
    only = 1 << number
    pairs = itertools.permutations(NAMES[:people], 2)
    # A mutual relation is told one way round only: a held-out problem must not return with its names swapped.
    told = [(relation, a, b) for a, b in pairs for relation in RELATIONS if a < b or relation not in MUTUAL]
    true = [clue for clue in told if _fit(clue, people) & only]
    rng.shuffle(true)
    clues, left = list[Clue](), _fit_all((), people)
    while left != only:
        clue = true.pop()
        if left & _fit(clue, people) != left:
            clues.append(clue)
            left &= _fit(clue, people)
    for clue in list(clues):
        others = [other for other in clues if other != clue]
        if _fit_all(others, people) == only:
            clues = others
    return _orders(people)[number], tuple(sorted(clues))


def tell_ordering(problem: tuple[Order, tuple[Clue, ...]], rng: Random, params: Params) -> Puzzle:
    """Find the place of one person: fit all clues but the last, then try what is left."""
    order, clues = problem[0], rng.sample(problem[1], len(problem[1]))
    wanted, last = rng.choice(order), len(clues)
    place = order.index(wanted) + 1
    said = " ".join(f"({i}) {RELATIONS[relation].format(a, b)}." for i, (relation, a, b) in enumerate(clues, 1))
    question = f"{', '.join(sorted(order))} stand in a row. {said} At which place from the left does {wanted} stand?"
    left = _fit_all(clues[:-1], len(order))
    rows = [row for i, row in enumerate(_orders(len(order))) if left >> i & 1]
    failed = "".join(f"Try {', '.join(row)}: ({last}) fails. Wait, go back. " for row in rows if row != order)
    checked = ", ".join(f"({i}) holds" for i in range(1, last + 1))
    thinking = (
        f"I want the place of {wanted}, so I work back: for it I need a row that fits every clue. "
        f"First goal: rows that fit all clues but ({last}). There are {len(rows)}. Next goal: test them. {failed}"
        f"Try {', '.join(order)}: ({last}) holds. Let me check: {checked}. {wanted} is at place {place}. "
    )
    return Puzzle((TextPart(f"{question} {BOX_REQUEST}"),), box(thinking, place), str(place))


Step = tuple[str, int]  # (operation, number)


def _undo(step: Step, value: int) -> int | None:
    """The positive number that ``step`` turns into ``value``, None if there is none."""
    operation, number = step
    if operation == "*":
        return value // number if value % number == 0 else None
    before = value - number if operation == "+" else value + number
    return before if before > 0 else None


def _work_back(order: Sequence[Step], target: int) -> list[int | None]:
    """The numbers before the last step, the one before it, and so on; ends with None where a step cannot be undone."""
    values: list[int | None] = []
    value: int | None = target
    for step in reversed(order):
        value = _undo(step, value) if value is not None else None
        values.append(value)
        if value is None:
            break
    return values


def draw_countdown(rng: Random, params: Params) -> tuple[int, tuple[Step, ...], int]:
    """A start, steps and a target that some orders of the steps reach, all with one number before the last step."""
    while True:
        start = rng.randint(2, 9)
        steps = tuple((rng.choice("+-*"), rng.randint(2, 9)) for _ in range(params["steps"]))
        value: int = start
        for operation, number in steps:
            value = {"+": value + number, "-": value - number, "*": value * number}[operation]
        if not 0 < value < 200:
            continue
        walks = [_work_back(order, value) for order in itertools.permutations(steps)]
        reaching = {walk[0] for walk in walks if walk[-1] == start}
        if len(reaching) == 1 and any(walk[-1] != start for walk in walks):
            return start, tuple(sorted(steps)), value


def tell_countdown(problem: tuple[int, tuple[Step, ...], int], rng: Random, params: Params) -> Puzzle:
    """Find the number before the last step by working back from the target."""
    start, steps, target = problem
    orders = list(itertools.permutations(steps))
    rng.shuffle(orders)
    reaching = [order for order in orders if _work_back(order, target)[-1] == start]
    failing = [order for order in orders if order not in reaching]
    listed = ", ".join(operation + str(number) for operation, number in steps)
    question = (
        f"Start at {start}. Use each of the steps {listed} once, in some order, to reach {target}. "
        f"Every number on the way must be positive. Which number stands before the last step? {BOX_REQUEST}"
    )
    walks = dict.fromkeys(_told_walk(order, start, target) for order in failing)
    told = "".join(f"{walk} Wait, go back. " for walk in list(walks)[:MAX_FAILED])
    good = reaching[0]
    numbers = [*reversed(_work_back(good, target)), target]
    forward = ", ".join(f"{a}{op}{n}={b}" for a, (op, n), b in zip(numbers, good, numbers[1:], strict=False))
    thinking = (
        f"I want {target}, so I work back from it. First goal: the last step. Next goal: the steps before. "
        f"{told}{_told_walk(good, start, target)} Let me check: {forward}. "
    )
    answer = numbers[-2]
    assert answer is not None, "a reaching order can be undone"
    return Puzzle((TextPart(question),), box(thinking, answer), str(answer))


def _told_walk(order: Sequence[Step], start: int, target: int) -> str:
    walk = _work_back(order, target)
    told = [
        f"undo {operation}{number}: {'impossible' if value is None else value}"
        for (operation, number), value in zip(reversed(order), walk, strict=False)
    ]
    end = "" if walk[-1] is None else ", the start" if walk[-1] == start else f", not {start}"
    return f"Try to {', '.join(told)}{end}."


ORDERING = Kind(draw_ordering, tell_ordering, {"people": Number(5, 4, len(NAMES))})
COUNTDOWN = Kind(draw_countdown, tell_countdown, {"steps": Number(3, 3, 4)})
