"""Generate text logic whose traces always show backward chaining, subgoals, backtracking and verification."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from random import Random

from ovr_megatron.data.puzzle_kind import Kind, Number, Params, Puzzle, box
from ovr_megatron.data.schema import BOX_REQUEST, TextPart

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")

MAX_FAILED = 2  # failed walks in a countdown trace
Order = tuple[str, ...]
Clue = tuple[str, str, str]  # (relation, who, whom)
Ordering = tuple[Order, tuple[Clue, ...]]
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
    order_bits = 0
    for i, order in enumerate(_orders(people)):
        if _holds(clue, order):
            order_bits |= 1 << i
    return order_bits


def _fit_all(clues: Iterable[Clue], people: int) -> int:
    """Return the orders that fit all ``clues`` as a bit set."""
    order_bits = (1 << len(_orders(people))) - 1  # without a clue, every order
    for clue in clues:
        order_bits &= _fit(clue, people)
    return order_bits


def _list_clues(people: int) -> list[Clue]:
    """List every clue about two of ``people`` persons."""
    clues: list[Clue] = []
    for a, b in itertools.permutations(NAMES[:people], 2):
        for relation in RELATIONS:
            # A mutual relation has one direction only: a held-out problem must not return with its names swapped.
            if a < b or relation not in MUTUAL:
                clues.append((relation, a, b))
    return clues


def draw_ordering(rng: Random, params: Params) -> Ordering:
    """Draw an order of people and a minimal set of clues that leaves no other order."""
    people = params["people"]
    index = rng.randrange(len(_orders(people)))
    solution = 1 << index
    true_clues = []
    for clue in _list_clues(people):
        if _fit(clue, people) & solution:
            true_clues.append(clue)
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
    order = _orders(people)[index]
    # Sorted, so that a problem has one hash: the clues were shuffled.
    return order, tuple(sorted(clues))


def pose_ordering(problem: Ordering, rng: Random, params: Params) -> Puzzle:
    """Ask for the position of one person.  The trace fits all clues but the last and tries the rows that remain."""
    order, sorted_clues = problem
    clues = rng.sample(sorted_clues, len(sorted_clues))
    person = rng.choice(order)
    position = order.index(person) + 1
    last = len(clues)
    sentences = []
    for i, (relation, who, whom) in enumerate(clues, start=1):
        statement = RELATIONS[relation].format(who, whom)
        sentences.append(f"({i}) {statement}.")
    question = (
        f"{', '.join(sorted(order))} stand in a row. {' '.join(sentences)} "
        f"At which place from the left does {person} stand?"
    )
    remaining = _fit_all(clues[:-1], len(order))
    rows = []
    failures = ""
    for i, row in enumerate(_orders(len(order))):
        if not remaining >> i & 1:
            continue
        rows.append(row)
        if row != order:
            failures += f"Try {', '.join(row)}: ({last}) fails. Wait, go back. "
    checks = [f"({i}) holds" for i in range(1, last + 1)]
    verification = ", ".join(checks)
    thinking = (
        f"I want the place of {person}, so I work back: for it I need a row that fits every clue. "
        f"First goal: rows that fit all clues but ({last}). There are {len(rows)}. Next goal: test them. {failures}"
        f"Try {', '.join(order)}: ({last}) holds. Let me check: {verification}. {person} is at place {position}. "
    )
    parts = (TextPart(f"{question} {BOX_REQUEST}"),)
    return Puzzle(parts, box(thinking, position), str(position))


Operation = tuple[str, int]  # (operator, operand)
Countdown = tuple[int, tuple[Operation, ...], int]  # (start, steps, target)


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
    # The question asks for positive numbers on the way.
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


def draw_countdown(rng: Random, params: Params) -> Countdown:
    """Draw a start, steps and a target.

    Some orders of the steps reach the target and some fail. All that reach it have the same number before the last
    step, so that the answer is unique.
    """
    while True:
        start = rng.randint(2, 9)
        steps: list[Operation] = []
        for _ in range(params["steps"]):
            sign = rng.choice("+-*")
            operand = rng.randint(2, 9)
            steps.append((sign, operand))
        target: int = start
        for operation in steps:
            target = _apply(operation, target)
        if not 0 < target < 200:
            continue
        answers = set()
        has_failure = False
        for order in itertools.permutations(steps):
            walk = _work_back(order, target)
            if walk[-1] == start:
                answers.add(walk[0])
            else:
                has_failure = True
        if len(answers) == 1 and has_failure:
            return start, tuple(sorted(steps)), target


def pose_countdown(problem: Countdown, rng: Random, params: Params) -> Puzzle:
    """Ask for the number before the last step.  The trace works back from the target."""
    start, steps, target = problem
    orders = list(itertools.permutations(steps))
    rng.shuffle(orders)
    solutions = []
    failures = []
    for order in orders:
        walk = _work_back(order, target)
        if walk[-1] == start:
            solutions.append(order)
        else:
            failures.append(order)
    listing = ", ".join(f"{sign}{operand}" for sign, operand in steps)
    question = (
        f"Start at {start}. Use each of the steps {listing} once, in some order, to reach {target}. "
        f"Every number on the way must be positive. Which number stands before the last step? {BOX_REQUEST}"
    )
    # Different orders can fail with the same words: each text occurs once, in the shuffled order.
    descriptions = [_describe_walk(order, start, target) for order in failures]
    distinct_walks = list(dict.fromkeys(descriptions))
    backtracking = ""
    for description in distinct_walks[:MAX_FAILED]:
        backtracking += f"{description} Wait, go back. "
    solution = solutions[0]
    numbers = [*reversed(_work_back(solution, target)), target]
    equations = []
    for i, (sign, operand) in enumerate(solution):
        before = numbers[i]
        after = numbers[i + 1]
        equations.append(f"{before}{sign}{operand}={after}")
    reaching_walk = _describe_walk(solution, start, target)
    thinking = (
        f"I want {target}, so I work back from it. First goal: the last step. Next goal: the steps before. "
        f"{backtracking}{reaching_walk} Let me check: {', '.join(equations)}. "
    )
    answer = numbers[-2]
    assert answer is not None, "a reaching order can be undone"
    parts = (TextPart(question),)
    return Puzzle(parts, box(thinking, answer), str(answer))


def _describe_walk(order: Sequence[Operation], start: int, target: int) -> str:
    """Describe in words how ``order`` is undone, and whether it leads back to ``start``."""
    walk = _work_back(order, target)
    undone = []
    # Not strict: a walk ends at the first step that cannot be undone.
    for (sign, operand), value in zip(reversed(order), walk, strict=False):
        result = "impossible" if value is None else value
        undone.append(f"undo {sign}{operand}: {result}")
    if walk[-1] is None:
        ending = ""
    elif walk[-1] == start:
        ending = ", the start"
    else:
        ending = f", not {start}"
    return f"Try to {', '.join(undone)}{ending}."


ORDERING = Kind(
    draw_ordering,
    pose_ordering,
    {"people": Number(5, 4, len(NAMES))},
)
COUNTDOWN = Kind(
    draw_countdown,
    pose_countdown,
    {"steps": Number(3, 3, 4)},
)
