"""Loading a pipeline component by component: the same pipeline, and bytes that add up."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from huggingface_hub.utils import are_progress_bars_disabled

from h2cache.eval.models import pipelines
from h2cache.eval.models.loading import _moved, weight_bytes
from h2cache.eval.models.pipelines import DiffusersModelConfig

COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")


@pytest.fixture(autouse=True)
def nothing_kept():
    """A pipeline that an earlier test loaded is loaded again."""
    pipelines._load.cache_clear()
    yield
    pipelines._load.cache_clear()


def config(**fields) -> DiffusersModelConfig:
    call = {"device": "cpu", "offload": "none", "height": 32, "width": 32, "num_inference_steps": 1}
    return DiffusersModelConfig(**{"path": None, "hub_id": None, "dtype": "float32", **call, **fields})


def told(model: DiffusersModelConfig) -> tuple[DiffusionPipeline, list[tuple[int, int]]]:
    """The pipeline, and what was said of its bytes."""
    said: list[tuple[int, int]] = []
    return pipelines.load_pipeline(model, lambda *each: said.append(each)), said


def on_disk(folder: Path) -> list[int]:
    return sorted(file.stat().st_size for name in COMPONENTS for file in (folder / name).glob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "vae_dtype"), [("float32", None), ("bfloat16", "float32")])
def test_it_is_the_pipeline_that_diffusers_loads(tiny_pipe_folder, dtype, vae_dtype):
    ours, _ = told(config(path=str(tiny_pipe_folder), dtype=dtype, vae_dtype=vae_dtype))
    dtypes = {"default": getattr(torch, dtype), "vae": getattr(torch, vae_dtype or dtype)}
    theirs = FluxPipeline.from_pretrained(tiny_pipe_folder, dtype=dtypes, local_files_only=True)
    assert type(ours) is FluxPipeline
    for name in COMPONENTS:
        mine, other = (getattr(pipe, name) for pipe in (ours, theirs))
        assert type(mine) is type(other) and mine.training == other.training
        known = other.state_dict()
        assert known.keys() == mine.state_dict().keys()
        for key, value in mine.state_dict().items():
            assert value.dtype == known[key].dtype and torch.equal(value, known[key]), (name, key)


def test_bytes_are_those_of_the_files_and_the_smallest_component_comes_first(tiny_pipe_folder):
    _, said = told(config(path=str(tiny_pipe_folder)))
    sizes = on_disk(tiny_pipe_folder)
    expected = [0, *(sum(sizes[: count + 1]) for count in range(len(sizes)))]
    assert len(sizes) == len(COMPONENTS) and said == [(done, sum(sizes)) for done in expected]


def test_a_kept_pipeline_is_not_loaded_again(tiny_pipe_folder):
    model = config(path=str(tiny_pipe_folder))
    assert told(model)[0] is told(model)[0]
    assert told(model)[1] == []


def test_of_several_variants_one_counts(tmp_path):
    for name, size in {"model.safetensors": 3, "model.fp16.safetensors": 5, "pytorch_model.bin": 7}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 3
    (tmp_path / "model.safetensors").unlink()
    assert weight_bytes(tmp_path) == 7


def test_moving_tells_the_share_that_is_there(transformer):
    """Every weight once, whatever holds it; weights that two modules share stay shared."""
    transformer.proj_out.weight = transformer.x_embedder.weight
    shares = list(_moved(transformer, torch.device("meta")))
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(set(shares)) > 20
    assert {each.device.type for each in transformer.parameters()} == {"meta"}


def test_a_model_of_the_hub_is_loaded_from_where_it_was_downloaded(tiny_pipe_folder, tmp_path, monkeypatch):
    """The cache as the hub's own library writes it; nobody is asked over the network."""
    kept = tmp_path / "models--somebody--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / ("a" * 40)).symlink_to(tiny_pipe_folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pipe, said = told(config(hub_id="somebody/tiny"))
    assert type(pipe) is FluxPipeline and said[-1] == (sum(on_disk(tiny_pipe_folder)),) * 2


def test_the_hub_shows_its_bars_for_the_next_download(tiny_pipe_folder, capsys):
    """transformers' switch for its own bar turns them off as well."""
    before = are_progress_bars_disabled()
    told(config(path=str(tiny_pipe_folder)))
    assert are_progress_bars_disabled() == before
    assert "oading" not in capsys.readouterr().err
