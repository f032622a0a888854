"""Generate text logic whose traces always show backward chaining, subgoals, backtracking and verification."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from random import Random

from ovr_megatron.data.puzzle_kind import Kind, Number, Params, Puzzle, box
from ovr_megatron.data.schema import BOX_REQUEST, TextPart

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")

MAX_FAILED = 2  # failed walks in a countdown trace
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
    if relation == "left":
        return distance > 0
    if relation == "beside":
        return abs(distance) == 1
    assert relation == "apart", relation
    return abs(distance) > 1


@functools.cache
def _orders(people: int) -> tuple[Order, ...]:
    """Return every order of the first ``people`` names."""
    return tuple(itertools.permutations(NAMES[:people]))


@functools.cache
def _fit(clue: Clue, people: int) -> int:
    """Return the orders that fit ``clue`` as a bit set: bit i stands for order i of `_orders`."""
    return sum(1 << i for i, order in enumerate(_orders(people)) if _holds(clue, order))


def _fit_all(clues: Iterable[Clue], people: int) -> int:
    """Return the orders that fit all ``clues`` as a bit set."""
    all_orders = (1 << len(_orders(people))) - 1
    return functools.reduce(operator.and_, (_fit(clue, people) for clue in clues), all_orders)


def _list_clues(people: int) -> list[Clue]:
    """List every clue about two of ``people`` persons."""
    clues: list[Clue] = []
    for a, b in itertools.permutations(NAMES[:people], 2):
        for relation in RELATIONS:
            # A mutual relation has one direction only: a held-out problem must not return with its names swapped.
            if a < b or relation not in MUTUAL:
                clues.append((relation, a, b))
    return clues


def draw_ordering(rng: Random, params: Params) -> tuple[Order, tuple[Clue, ...]]:
    """Draw an order of people and a minimal set of clues that leaves no other order."""
    people = params["people"]
    index = rng.randrange(len(_orders(people)))
    solution = 1 << index
    true_clues = [clue for clue in _list_clues(people) if _fit(clue, people) & solution]
    rng.shuffle(true_clues)
    clues: list[Clue] = []
    remaining = _fit_all((), people)
    while remaining != solution:
        clue = true_clues.pop()
        narrowed = remaining & _fit(clue, people)
        if narrowed != remaining:
            clues.append(clue)
            remaining = narrowed
    # A clue may have become superfluous through later ones.
    for clue in list(clues):
        without_clue = [other_clue for other_clue in clues if other_clue != clue]
        if _fit_all(without_clue, people) == solution:
            clues = without_clue
    return _orders(people)[index], tuple(sorted(clues))


def pose_ordering(problem: tuple[Order, tuple[Clue, ...]], rng: Random, params: Params) -> Puzzle:
    """Ask for the position of one person.  The trace fits all clues but the last and tries the rows that remain."""
    order, sorted_clues = problem
    clues = rng.sample(sorted_clues, len(sorted_clues))
    person = rng.choice(order)
    position = order.index(person) + 1
    last = len(clues)
    sentences = [f"({i}) {RELATIONS[relation].format(a, b)}." for i, (relation, a, b) in enumerate(clues, start=1)]
    question = (
        f"{', '.join(sorted(order))} stand in a row. {' '.join(sentences)} "
        f"At which place from the left does {person} stand?"
    )
    remaining = _fit_all(clues[:-1], len(order))
    rows = [row for i, row in enumerate(_orders(len(order))) if remaining >> i & 1]
    failures = "".join(f"Try {', '.join(row)}: ({last}) fails. Wait, go back. " for row in rows if row != order)
    verification = ", ".join(f"({i}) holds" for i in range(1, last + 1))
    thinking = (
        f"I want the place of {person}, so I work back: for it I need a row that fits every clue. "
        f"First goal: rows that fit all clues but ({last}). There are {len(rows)}. Next goal: test them. {failures}"
        f"Try {', '.join(order)}: ({last}) holds. Let me check: {verification}. {person} is at place {position}. "
    )
    return Puzzle((TextPart(f"{question} {BOX_REQUEST}"),), box(thinking, position), str(position))


Operation = tuple[str, int]  # (operator, operand)


def _apply(operation: Operation, value: int) -> int:
    sign, operand = operation
    if sign == "+":
        return value + operand
    if sign == "-":
        return value - operand
    return value * operand


def _undo(operation: Operation, value: int) -> int | None:
    """Return the positive number that ``operation`` turns into ``value``, None if there is none."""
    sign, operand = operation
    if sign == "*":
        return value // operand if value % operand == 0 else None
    before = value - operand if sign == "+" else value + operand
    return before if before > 0 else None


def _work_back(order: Sequence[Operation], target: int) -> list[int | None]:
    """Return the numbers before the last step, before the second last, and so on.

    The list ends with None where a step cannot be undone.
    """
    values: list[int | None] = []
    value: int | None = target
    for operation in reversed(order):
        value = _undo(operation, value) if value is not None else None
        values.append(value)
        if value is None:
            break
    return values


def draw_countdown(rng: Random, params: Params) -> tuple[int, tuple[Operation, ...], int]:
    """Draw a start, steps and a target.

    Some orders of the steps reach the target and some fail. All that reach it have the same number before the last
    step, so that the answer is unique.
    """
    while True:
        start = rng.randint(2, 9)
        steps = tuple((rng.choice("+-*"), rng.randint(2, 9)) for _ in range(params["steps"]))
        target: int = start
        for operation in steps:
            target = _apply(operation, target)
        if not 0 < target < 200:
            continue
        walks = [_work_back(order, target) for order in itertools.permutations(steps)]
        answers = {walk[0] for walk in walks if walk[-1] == start}
        if len(answers) == 1 and any(walk[-1] != start for walk in walks):
            return start, tuple(sorted(steps)), target


def pose_countdown(problem: tuple[int, tuple[Operation, ...], int], rng: Random, params: Params) -> Puzzle:
    """Ask for the number before the last step.  The trace works back from the target."""
    start, steps, target = problem
    orders = list(itertools.permutations(steps))
    rng.shuffle(orders)
    solutions = [order for order in orders if _work_back(order, target)[-1] == start]
    failures = [order for order in orders if order not in solutions]
    listing = ", ".join(sign + str(operand) for sign, operand in steps)
    question = (
        f"Start at {start}. Use each of the steps {listing} once, in some order, to reach {target}. "
        f"Every number on the way must be positive. Which number stands before the last step? {BOX_REQUEST}"
    )
    # Different orders can fail with the same words: each text occurs once, in the shuffled order.
    walks = dict.fromkeys(_describe_walk(order, start, target) for order in failures)
    backtracking = "".join(f"{walk} Wait, go back. " for walk in list(walks)[:MAX_FAILED])
    solution = solutions[0]
    numbers = [*reversed(_work_back(solution, target)), target]
    equations = [
        f"{before}{sign}{operand}={after}"
        for before, (sign, operand), after in zip(numbers, solution, numbers[1:], strict=False)
    ]
    thinking = (
        f"I want {target}, so I work back from it. First goal: the last step. Next goal: the steps before. "
        f"{backtracking}{_describe_walk(solution, start, target)} Let me check: {', '.join(equations)}. "
    )
    answer = numbers[-2]
    assert answer is not None, "a reaching order can be undone"
    return Puzzle((TextPart(question),), box(thinking, answer), str(answer))


def _describe_walk(order: Sequence[Operation], start: int, target: int) -> str:
    """Describe in words how ``order`` is undone, and whether it leads back to ``start``."""
    walk = _work_back(order, target)
    undone = [
        f"undo {sign}{operand}: {'impossible' if value is None else value}"
        for (sign, operand), value in zip(reversed(order), walk, strict=False)
    ]
    if walk[-1] is None:
        ending = ""
    elif walk[-1] == start:
        ending = ", the start"
    else:
        ending = f", not {start}"
    return f"Try to {', '.join(undone)}{ending}."


ORDERING = Kind(draw_ordering, pose_ordering, {"people": Number(5, 4, len(NAMES))})
COUNTDOWN = Kind(draw_countdown, pose_countdown, {"steps": Number(3, 3, 4)})
