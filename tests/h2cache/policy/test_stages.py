"""Stages: the parts of a method, and which of them go together."""

import pytest

from h2cache.policy.clusters import Clusters
from h2cache.policy.forecasts import Taylor
from h2cache.policy.probes import ModulatedInput
from h2cache.policy.rules import Interval
from h2cache.policy.stages import BlockStage, ModuleStage


def test_a_stage_of_ones_own_is_told_what_does_not_go_together():
    """Nothing measures inside blocks, and clusters refresh the forecasts of modules alone."""
    parts = dict(name="mine", roles=("structure",), rule=Interval(3, 1), forecast=Taylor(1))
    with pytest.raises(TypeError, match="'probe'"):
        ModuleStage(**parts, probe=ModulatedInput())
    with pytest.raises(TypeError, match="'parent'"):
        ModuleStage(**parts, parent="structure")
    with pytest.raises(TypeError, match="'clusters'"):
        BlockStage(**parts, clusters=Clusters())
