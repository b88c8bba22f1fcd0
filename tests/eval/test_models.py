"""The `model` options of run.py: what each passes to its pipeline, and what is said of one that cannot be had."""

import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import FluxPipeline
from hydra.utils import instantiate
from PIL import Image
from repository import REPOSITORY
from rich.console import Console

import run
from h2cache import H2CacheConfig
from h2cache.eval.cli import doctor
from h2cache.eval.cli import draw as job
from h2cache.eval.errors import UserError
from h2cache.eval.generation.generate import generate
from h2cache.eval.models.identity import identity
from h2cache.eval.models.pipelines import DiffusersModelConfig, ModelConfig, load_pipeline, takes

# The class that the hub's model_index.json of each model names.
PIPELINES = {
    "flux2-dev": "Flux2Pipeline",
    "qwen-image": "QwenImagePipeline",
    "wan2.2-t2v-a14b": "WanPipeline",
    "wan2.2-ti2v-5b": "WanPipeline",
    "hunyuan-video": "HunyuanVideoPipeline",
    "z-image-turbo": "ZImagePipeline",
    "sd3.5-large": "StableDiffusion3Pipeline",
}
NOT_OF_A_CALL = {"_target_", "path", "hub_id", "dtype", "vae_dtype", "vae_tiling", "device", "offload", "fps"}
VIDEOS = {"wan2.2-t2v-a14b", "wan2.2-ti2v-5b", "hunyuan-video"}
SMALL = {"dtype": "float32", "device": "cpu", "height": 32, "width": 32, "num_inference_steps": 3}
FIELDS = SMALL | {"hub_id": None, "offload": "none"}


def written(name: str) -> dict:
    return yaml.safe_load((REPOSITORY / f"configs/model/{name}.yaml").read_text(encoding="utf-8"))


def arguments_for(folder: Path) -> list[str]:
    return [f"model.path={folder}", *(f"model.{field}={value}" for field, value in SMALL.items())]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("seed=x")` runs run.py's main in `tmp_path`; returns its exit code, stdout and stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        code = 0
        try:
            run.main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return command


@pytest.mark.parametrize("name", PIPELINES)
def test_every_call_argument_of_a_model_is_one_of_its_pipeline(name):
    config = instantiate(written(name))
    assert isinstance(config, DiffusersModelConfig)
    pipeline = getattr(diffusers, PIPELINES[name])
    fields = set(written(name)) - NOT_OF_A_CALL
    assert fields <= set(config.call_fields)
    assert [field for field in fields if not takes(pipeline, field)] == []


@pytest.mark.parametrize("name", PIPELINES)
def test_what_makes_videos_says_so(name):
    assert instantiate(written(name)).makes_videos == (name in VIDEOS)
    assert takes(getattr(diffusers, PIPELINES[name]), "num_frames") == (name in VIDEOS)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_doctor_lists_it(name):
    assert name in [each for names in doctor.verdicts().values() for each in names]


def test_an_argument_of_null_is_left_to_the_pipeline():
    config = DiffusersModelConfig(**FIELDS, path="x", guidance_scale=None, num_frames=5, fps=8)
    assert config.call_arguments == {"height": 32, "width": 32, "num_inference_steps": 3, "num_frames": 5}


def test_the_identity_of_the_flux_models_is_what_their_records_hold():
    """Another one would draw every stored image again."""
    fields = {"dtype": "bfloat16", "height": 1024, "width": 1024, "guidance_scale": 3.5, "max_sequence_length": 512}
    weights = "black-forest-labs/FLUX.1-dev"
    assert identity(instantiate(written("flux1-dev"))) == {"class": "ModelConfig", "weights": weights, **fields}
    nunchaku = {
        "generation": "v2",
        "weights": "nunchaku-tech/nunchaku-flux.1-dev/svdq-{precision}_r32-flux.1-dev.safetensors",
        "precision": "auto",
        "text_encoder_2": None,
        "attention": "auto",
        "lora": None,
        "lora_strength": 1.0,
    }
    expected = {"class": "NunchakuModelConfig", **fields, **nunchaku}
    assert identity(instantiate(written("nunchaku-flux1-dev"))) == expected


def test_the_identity_of_a_model_counts_what_its_images_depend_on():
    config = instantiate(written("qwen-image"))
    for changes in (
        {"true_cfg_scale": 3.0},
        {"negative_prompt": "blurred"},
        {"height": 1024},
        {"vae_dtype": "float32"},
    ):
        assert identity(replace(config, **changes)) != identity(config)
    for changes in ({"device": "cpu"}, {"num_inference_steps": 9}):
        assert identity(replace(config, **changes)) == identity(config)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("model=qwen-image model.guidance=3", ["there is no field guidance", "true_cfg_scale", "max_sequence_length"]),
        ("model=qwen-image +model.guidance=3", ["there is no field guidance", "true_cfg_scale", "num_frames", "fps"]),
        ("+model.guidance=3", ["there is no field guidance", "guidance_scale"]),
        ("model=qwen-image model.true_cfg_scale=high", ["true_cfg_scale='high'", "number"]),
        ("model=qwen-image model.negative_prompt=3", ["negative_prompt=3", "text"]),
        ("model=qwen-image model.max_sequence_length=0", ["max_sequence_length=0", "whole number from 1"]),
        ("model=qwen-image model.width=100", ["width=100", "multiple of 16"]),
        ("model=qwen-image +model.vae_tiling=3", ["vae_tiling=3", "true or false"]),
        ("model=wan2.2-ti2v-5b model.num_frames=2.5", ["num_frames=2.5", "whole number from 1"]),
        ("model=wan2.2-ti2v-5b model.fps=null", ["fps=None", "whole number from 1"]),
        ("model=wan2.2-ti2v-5b model.vae_dtype=int8", ["vae_dtype='int8'", "float32", "bfloat16"]),
        ("model=wan2.2-ti2v-5b out=cat.gif", ["cat.gif", ".png or .mp4"]),
        ("model=qwen-image out=cat.mp4", ["cat.mp4", "must end in .png"]),
        ("method=plan model.num_inference_steps=30", ["steps 50", "30", "calibrate", "method.allow_transfer=true"]),
        ("model=qwen-image model.path=nowhere", ["nowhere", "model_index.json", "another diffusers pipeline"]),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence(command, tmp_path, argument, says):
    code, stdout, stderr = command(*argument.split())
    assert (code, stdout, stderr.count("\n"), list(tmp_path.iterdir())) == (2, "", 1, [])
    assert [word for word in says if word not in stderr] == []


@pytest.mark.parametrize("name", PIPELINES)
def test_a_model_of_the_hub_without_network(command, tmp_path, name):
    code, stdout, stderr = command(f"model={name}", "model.device=cpu")
    assert (code, stdout, stderr.count("\n"), list(tmp_path.iterdir())) == (2, "", 1, [])
    assert all(word in stderr for word in (written(name)["hub_id"], "network", "model.path=", "model=flux-mini"))


def test_a_folder_that_is_only_half_a_pipeline(command, tiny_pipe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    (folder / "model_index.json").write_text((tiny_pipe_folder / "model_index.json").read_text())
    code, _, stderr = command("model=sd3.5-large", *arguments_for(folder))
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"{folder} does not load as a diffusers pipeline" in stderr and "is it complete?" in stderr


def drawn_directly(pipe: FluxPipeline, **arguments) -> np.ndarray:
    sizes = {"height": 32, "width": 32, "num_inference_steps": 3}
    return np.asarray(pipe("a cat", generator=torch.manual_seed(0), **sizes, **arguments).images[0])


def test_a_model_draws_with_its_own_arguments(command, tiny_pipe, tiny_pipe_folder, tmp_path):
    """Those of Qwen-Image, which Flux takes too: true guidance, with a negative prompt."""
    fields = ["model.true_cfg_scale=2.5", "model.negative_prompt=blur", "model.max_sequence_length=24"]
    code, _, stderr = command(
        "model=qwen-image", *arguments_for(tiny_pipe_folder), *fields, "method=none", "prompt=a cat"
    )
    assert (code, stderr) == (0, "")
    arguments = {"true_cfg_scale": 2.5, "negative_prompt": "blur", "max_sequence_length": 24}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), drawn_directly(tiny_pipe, **arguments))


def test_what_a_pipeline_does_not_take_is_left_out_with_a_note(command, tiny_pipe, tiny_pipe_folder, tmp_path):
    """Flux makes no videos, so that there is no MP4 either."""
    fields = ["model.vae_dtype=null", "model.max_sequence_length=24", "method=none", "prompt=a cat"]
    code, _, stderr = command("model=wan2.2-t2v-a14b", *arguments_for(tiny_pipe_folder), *fields)
    assert code == 0
    assert "FluxPipeline does not take it: guidance_scale_2, num_frames" in " ".join(stderr.split())
    picture = drawn_directly(tiny_pipe, guidance_scale=4.0, max_sequence_length=24)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), picture)
    assert not list(tmp_path.glob("*.mp4"))


def test_another_call_does_not_load_the_model_again(tiny_pipe_folder):
    config = DiffusersModelConfig(**FIELDS, path=str(tiny_pipe_folder), guidance_scale=2.0)
    pipe = load_pipeline(config)
    calls = {"guidance_scale": 3.0, "true_cfg_scale": 2.0, "negative_prompt": "blur", "max_sequence_length": 9}
    assert load_pipeline(replace(config, **calls, height=64, num_inference_steps=5)) is pipe
    assert load_pipeline(replace(config, vae_dtype="float32")) is not pipe


def test_generate_watches_the_text_encoders_only_while_it_draws(tiny_pipe):
    sizes = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 24}
    drawing = generate(tiny_pipe, "a cat", 0, no_such_argument=3, **sizes)
    assert min(drawing.text_seconds, drawing.denoising_seconds, drawing.vae_seconds) > 0
    assert not drawing.is_video and drawing.frames == (drawing.image,)
    assert not any(encoder._forward_hooks for encoder in (tiny_pipe.text_encoder, tiny_pipe.text_encoder_2))

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny_pipe, "a cat", 0, interrupted, **sizes)
    assert not any(encoder._forward_hooks for encoder in (tiny_pipe.text_encoder, tiny_pipe.text_encoder_2))


def test_the_text_ends_with_the_last_text_encoder(tiny_pipe, monkeypatch):
    """Each reading of the clock is the number of calls of text encoders, steps and VAE until then."""
    done = []
    monkeypatch.setattr("h2cache.eval.generation.generate._now", lambda device: len(done))
    parts = (tiny_pipe.text_encoder, tiny_pipe.text_encoder_2, tiny_pipe.transformer, tiny_pipe.vae.decoder)
    counts = [part.register_forward_pre_hook(lambda *_: done.append(1)) for part in parts]
    drawing = generate(tiny_pipe, "a cat", 0, height=32, width=32, num_inference_steps=3, max_sequence_length=24)
    for count in counts:
        count.remove()
    assert (drawing.text_seconds, drawing.denoising_seconds, drawing.vae_seconds) == (2, 3, 1)


def test_a_model_that_cannot_be_cached_is_one_sentence():
    with pytest.raises(UserError, match="Linear"):
        job._apply(torch.nn.Linear(2, 2), H2CacheConfig())


def test_a_t5_prompt_that_is_too_long_is_noted(tiny_pipe, tiny_pipe_folder, capsys):
    """The prompt has more tokens of CLIP as well, of which nothing is said."""
    config = DiffusersModelConfig(**FIELDS, path=str(tiny_pipe_folder), max_sequence_length=7)
    wanted = job.Job("abcdefg", None, 0, Path("image.png"), False, config, None)
    job._note_truncation(wanted, tiny_pipe, Console(width=200, stderr=True))
    read_and_written = f"the model reads 7 of the prompt's {len(tiny_pipe.tokenizer_2('abcdefg').input_ids)} tokens"
    assert capsys.readouterr().err == f"note: {read_and_written} (model.max_sequence_length)\n"
    longer = replace(wanted, model=replace(config, max_sequence_length=30))
    job._note_truncation(longer, tiny_pipe, Console(width=200, stderr=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("contexts", "samples", "stages"),
    [
        (["", ""], [0, 0], ["detail", "detail"]),
        (["cond", "uncond"], [0, 0], ["detail cond", "detail uncond"]),
        (["", ""], [0, 1], ["detail 0", "detail 1"]),  # guidance as a doubled batch
    ],
)
def test_each_branch_of_guidance_has_a_row_of_its_own(contexts, samples, stages):
    trace = pd.DataFrame({"stage": "detail", "context": contexts, "sample": samples})
    assert list(job._by_branch(trace)["stage"]) == stages


def test_the_flux_models_keep_their_limits():
    with pytest.raises(ValueError, match="from 1 to 512"):
        ModelConfig(**FIELDS, path="x", guidance_scale=3.5, max_sequence_length=513)
    with pytest.raises(ValueError, match="guidance_scale=None"):
        ModelConfig(**FIELDS, path="x", guidance_scale=None, max_sequence_length=40)
