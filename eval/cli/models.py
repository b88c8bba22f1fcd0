"""What a user may call a model on the command line, as overrides for Hydra."""

from pathlib import Path

from omegaconf import OmegaConf

from h2cache.eval.cli.arguments import as_typed
from h2cache.eval.files import CONFIGS


def overrides(model: str) -> list[str]:
    """What makes Hydra use this model.

    Args:
        model: an option of configs/model, the hub id of one of them or of any other pipeline, or a folder.
    """
    if "/" not in model and not Path(model).is_dir():
        return [f"model={model}"]
    known = {_hub_id(file): file.stem for file in sorted((CONFIGS / "model").glob("*.yaml"), reverse=True)}
    if model in known:
        return [f"model={known[model]}"]
    field = "path" if Path(model).expanduser().is_dir() else "hub_id"
    any_model = [f"hydra.searchpath=['file://{CONFIGS / 'more'}']", "model=diffusers"]
    return [*any_model, as_typed(f"model.{field}={model}", [f"model.{field}"], multirun=False)]


def _hub_id(file: Path) -> str:
    """Of a model's configuration; empty where it has none."""
    return OmegaConf.load(file).get("hub_id") or ""
