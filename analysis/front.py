"""Which points no other dominates, and where the front bends. Plain functions of numbers."""

import numpy as np

_EPSILON = 1e-9  # how far below the line between the ends the knee has to lie, as a share of the front's height


def pareto_front(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Which of n points no other point dominates: bool [n] for costs [n] and losses [n], both better when
    smaller.

    A point dominates another if it is no worse in both and better in one; equal points do not dominate each
    other.
    """
    front = np.zeros(len(costs), dtype=bool)
    best, best_cost = np.inf, -np.inf
    for index in np.lexsort((losses, costs)):
        if losses[index] < best or (losses[index] == best and costs[index] == best_cost):
            front[index] = True
            best, best_cost = losses[index], costs[index]
    return front


def knee(costs: np.ndarray, losses: np.ndarray, *, logarithmic: bool = False) -> int | None:
    """Position of the point of a front where it bends: farthest below the line between the front's ends, both axes
    scaled to 0..1.

    `costs` [n] ascend; `logarithmic` takes the (positive) losses [n] by their logarithms. None for fewer than three
    points, or a front that does not bend inwards.
    """
    if len(costs) < 3:
        return None
    heights = np.log(losses) if logarithmic else np.asarray(losses, dtype=np.float64)
    width, drop = costs[-1] - costs[0], heights[0] - heights[-1]
    if not (width > 0 and drop > 0):
        return None
    below = 1 - (costs - costs[0]) / width - (heights - heights[-1]) / drop
    deepest = int(np.argmax(below))
    return deepest if below[deepest] > _EPSILON else None
