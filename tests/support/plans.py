"""A plan for tests, and any plan for tests with hypothesis."""

from hypothesis import strategies as st

from h2cache import Plan
from h2cache.plans.conditions import Conditions
from h2cache.plans.plan import normalized

# Eight steps, of which 0, 1, 3 and 6 are computed; weights are of the newest output first.
WEIGHTS = {2: (1.6, -0.6), 4: (1.2, 0.3, -0.5), 5: (1.5, -0.2, -0.3), 7: (1.3, -0.4, 0.1)}
PLAN = Plan(Conditions(steps=8), (0, 1, 3, 6), WEIGHTS)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any steps computed, any weights for the others."""
    steps = draw(st.integers(1, 9))
    computed = (0, *(step for step in range(1, steps) if draw(st.booleans())))
    weights = {}
    for step in set(range(steps)) - set(computed):
        older = draw(st.lists(st.floats(-1, 1), max_size=sum(earlier < step for earlier in computed) - 1))
        weights[step] = normalized((1.0, *older))
    return Plan(Conditions(steps=steps), computed, weights)
