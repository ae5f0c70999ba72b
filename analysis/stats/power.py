"""How small a difference n paired items can show, and how many items a difference takes.

From the observed spread of the differences: sd = stderr · √n, so that clustering, where the standard error knows of
it, counts. Two-sided paired t test with its noncentral distribution; the chance to reject on the wrong side, far
below a thousandth at any useful power, is left out.
"""

import math

from scipy import special

from analysis.stats.estimates import Estimate, require_share
from qbench.errors import EvaluationError

_NORMAL_ABOVE = 10_000  # degrees of freedom from which on t is normal to four digits, and the inverse unreliable


def smallest_effect(found: Estimate, *, n: float | None = None, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true difference, in the metric's unit, that a test of n items (None: as many as there are) detects with
    probability `power`.

    Raises EvaluationError for a difference without standard error.
    """
    require_share("power", power)
    require_share("alpha", alpha)
    if found.stderr is None:
        raise EvaluationError("a detectable effect needs the standard error of a difference, so at least two items")
    items = found.n if n is None else n
    independent = (found.df + 1) * items / found.n
    return _distance(independent - 1, power, alpha) * found.stderr * math.sqrt(found.n / items)


def items_needed(
    found: Estimate, effect: float | None = None, *, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """The number of items with which a true difference of `effect` (None: the observed one) is detected with
    probability `power`, were the spread of the differences as observed; None for an effect of 0, which none shows."""
    size = abs(found.value if effect is None else effect)
    if size == 0:
        return None
    per_cluster = found.n / (found.df + 1)
    low = high = math.ceil(2 * per_cluster)  # two independent items are the least
    while smallest_effect(found, n=high, power=power, alpha=alpha) > size:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = smallest_effect(found, n=middle, power=power, alpha=alpha) <= size
        low, high = (low, middle) if enough else (middle, high)
    return high


def _distance(df: float, power: float, alpha: float) -> float:
    """Which true difference, in standard errors, the t test with df degrees of freedom detects."""
    if df > _NORMAL_ABOVE:
        return float(special.ndtri(1 - alpha / 2) + special.ndtri(power))
    critical = special.stdtrit(df, 1 - alpha / 2)
    return float(special.nctdtrinc(df, 1 - power, critical))
