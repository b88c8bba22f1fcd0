"""The method `plan` of the command line: a file for any model, and the one that ships where there is one."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf.errors import MissingMandatoryValue
from repository import REPOSITORY

FILE = "assets/plans/flux-mini-6.json"


@pytest.fixture
def composed():
    """`run.py method=plan` with more arguments, as its method."""
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        yield lambda *more: compose("run", overrides=["method=plan", *more]).method


def test_a_file_serves_any_model(composed):
    for model in ("flux-mini", "flux1-dev", "sd3.5-large"):
        assert len(instantiate(composed(f"model={model}", f"method.plan={FILE}")).plan.computed) == 8


def test_without_a_file_it_is_the_one_that_ships(composed):
    assert len(instantiate(composed("model=flux-mini")).plan.computed) == 12
    with pytest.raises(MissingMandatoryValue):
        _ = composed("model=flux1-dev").plan
