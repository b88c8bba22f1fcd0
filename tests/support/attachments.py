"""What hangs on a model: attributes, hooks, and the cache that a test may have left."""

from typing import Any

from torch import nn

from h2cache.runtime.interception import interception_of


def take_off(transformer: nn.Module) -> None:
    """Remove whatever method a failed test may have left on a shared model."""
    worn = interception_of(transformer)
    if worn is not None:
        worn.owner.detach()


def inside(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on a model, by module and attribute: the objects themselves, containers by their items."""
    found = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        for attribute, value in vars(module).items():
            found[name, attribute] = dict(value) if isinstance(value, dict) else value
    return found


def assert_same_inside(model: nn.Module, before: dict[str, Any]) -> None:
    after = inside(model)
    assert after.keys() == before.keys()
    for place, value in before.items():
        if isinstance(value, dict):
            assert after[place].keys() == value.keys(), place
            assert all(after[place][key] is item for key, item in value.items()), place
        else:
            assert after[place] is value, place
