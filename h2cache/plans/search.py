"""From a schedule to a better one: hill climbing against the final image, the most promising neighbours first."""

from collections.abc import Callable

Steps = tuple[int, ...]


def climb(
    start: Steps, steps: int, score: Callable[[Steps], float], cost: Callable[[Steps], float], tries: int
) -> Steps:
    """The best schedule that is come upon from `start`, where one computed step moves by one at a time.

    Args:
        start: computed steps, of `steps`.
        score: what is to be large, and is dear to know.
        cost: what is likely to be small where the score is large, and is cheap: neighbours are tried in this order.
        tries: how many neighbours are scored, at most.
    """
    current, value, seen = start, score(start), {start}
    while tries:
        waiting = sorted((each for each in neighbours(current, steps) if each not in seen), key=cost)
        for candidate in waiting[:tries]:
            seen.add(candidate)
            tries -= 1
            tried = score(candidate)
            if tried > value:
                current, value = candidate, tried
                break
        else:
            break
    return current


def neighbours(current: Steps, steps: int) -> list[Steps]:
    """With one computed step, not the first, one earlier or later."""
    moved = (
        (*current[:index], current[index] + by, *current[index + 1 :])
        for index in range(1, len(current))
        for by in (-1, 1)
    )
    return [each for each in moved if len(set(each)) == len(each) and max(each) < steps and list(each) == sorted(each)]
