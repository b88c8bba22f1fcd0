"""What a run is to do: the fields of configs/eval.yaml, checked before the model is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from h2cache.eval.errors import UserError, check_count
from h2cache.eval.experiments.experiment import Experiment, Row
from h2cache.eval.experiments.read import read_experiments, why_unresolved
from h2cache.eval.generation.prompts import Prompt, PromptSet
from h2cache.eval.generation.records import Cell, Way
from h2cache.eval.generation.sweep import Launcher
from h2cache.eval.metrics import registry as quality
from h2cache.eval.models.pipelines import ModelConfig

FIELDS = "model protocol prompts experiments launcher limit out metric_weights".split()


@dataclass(frozen=True)
class Study:
    """`experiments` with their `prompts`, of each at most `limit`."""

    model: ModelConfig
    model_name: str
    launcher: Launcher
    experiments: tuple[Experiment, ...]
    prompts: Mapping[PromptSet, tuple[Prompt, ...]]
    limit: int | None
    out: Path
    metric_weights: Path | None

    @cached_property
    def rows(self) -> tuple[tuple[Row, ...], ...]:
        """Those of each of the experiments, prompt by prompt."""
        return tuple(
            tuple(each.rows(self.prompts[each.prompts], self.limit, self.model.num_inference_steps))
            for each in self.experiments
        )

    @property
    def metrics(self) -> list[str]:
        """Those of all experiments, each once."""
        return list(dict.fromkeys(name for experiment in self.experiments for name in experiment.metrics))

    @property
    def set_metrics(self) -> list[str]:
        """Likewise of sets of images."""
        return list(dict.fromkeys(name for experiment in self.experiments for name in experiment.set_metrics))

    @property
    def all_cells(self) -> list[Cell]:
        """Prompt by prompt, with the settings of all experiments that draw it, and what these are compared with."""
        prompts: dict[tuple[Prompt, int], dict[Cell, None]] = {}
        for of_one in self.rows:
            for row in of_one:
                for cell in (row.cell, *row.references.values()):
                    prompts.setdefault((cell.prompt, cell.seed), {})[cell] = None
        return [cell for cells in prompts.values() for cell in cells]

    @property
    def names(self) -> dict[Way, str]:
        """What to call a way of drawing: its setting's name, or what it is a reference for."""
        rows = [row for of_one in self.rows for row in of_one]
        references = {cell.way: f"{name} reference" for row in rows for name, cell in row.references.items()}
        return references | {row.cell.way: row.setting.name for row in rows}


def read_study(cfg: DictConfig, model_name: str, method: Callable[[str], DictConfig]) -> Study:
    """`method` gives the configuration of an option of configs/method. UserError for whatever is wrong."""
    if unknown := [str(field) for field in cfg if field not in FIELDS]:
        raise UserError(f"there is no field {unknown[0]}; choose from {', '.join(FIELDS)}")
    check_count("limit", cfg.limit, optional=True)
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(why_unresolved(error)) from error
    model, launcher = _made(cfg, "model"), _made(cfg, "launcher")
    experiments = read_experiments(cfg, method)
    prompts = {each: each.load() for each in dict.fromkeys(experiment.prompts for experiment in experiments)}
    for picture in {prompt.picture for loaded in prompts.values() for prompt in loaded}:
        model.check_picture(picture and picture.image)
    weights = Path(str(cfg.metric_weights)).expanduser() if cfg.metric_weights else None
    if weights and not weights.is_dir():
        raise UserError(
            f"metric_weights={weights}: there is no such folder; docs/metrics.md says what it holds, or null"
        )
    out = Path(str(cfg.out)).expanduser()
    study = Study(model, model_name, launcher, experiments, prompts, cfg.limit, out, weights)
    for experiment in experiments:
        for name in experiment.set_metrics:
            quality.set_metric(name)  # UserError for a name that is none
        for name in experiment.metrics:
            found = quality.kind(name)  # UserError for a name that is no metric
            if not (found.of_videos if model.makes_videos else found.of_images):
                made, other = ("videos", "images") if model.makes_videos else ("images", "videos")
                raise UserError(
                    f"model={model_name} makes {made}, and experiment={experiment.name} measures {other} ({name}): "
                    f"choose {'experiment=[video]' if model.makes_videos else 'another experiment'}"
                )
    return study


def _made(cfg: DictConfig, group: str) -> object:
    try:
        return instantiate(cfg[group], _convert_="all")
    except InstantiationException as error:
        raise UserError(f"{group}: {str(error.__cause__ or error).splitlines()[0]}") from error
