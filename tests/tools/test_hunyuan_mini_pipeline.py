"""hunyuan-mini's parts in the pipeline, with their first, untrained weights: training computes what the pipeline
computes, the stages fit each other, and run.py draws a video."""

import io
import json
import math
import sys
import threading

import av
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

import h2cache
import run
from h2cache.eval.demo import studio
from h2cache.eval.files import CONFIGS
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.generation.video_latents import recorded_latents
from h2cache.eval.metrics.motions import FRAMES, SIZE
from tools.flux_mini.export import write_pipeline
from tools.flux_mini.training import Average, save
from tools.hunyuan_mini import export, latents, text, transformer, vae
from tools.hunyuan_mini.clips import draw, is_held_out

PROMPTS = ["a red star moving right quickly on a blue background", "a pink ring"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What the training stages leave behind, after no training at all."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    save(folder / "vae.pt", 0, model=vae.build())
    latents.encode(folder, count=6, seed=0, device=torch.device("cpu"), batch=4)
    model = transformer.Denoiser()
    save(folder / "distilled.pt", 0, model=model, average=Average(model.parameters()))
    return folder


@pytest.fixture(scope="module")
def folder(work, tmp_path_factory):
    target = tmp_path_factory.mktemp("assets") / "hunyuan-mini"
    write_pipeline(export.build_pipeline(work, "distilled.pt"), target)
    return target


@pytest.fixture
def pipe(folder) -> HunyuanVideoPipeline:
    pipe = HunyuanVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_training_reads_a_prompt_as_the_pipeline_does(work):
    model = transformer.load(work / "distilled.pt").eval()
    with torch.no_grad():
        states, mask, pooled = model.encode(PROMPTS)
        theirs = export.build_pipeline(work, "distilled.pt").encode_prompt(
            PROMPTS, prompt_template=text.PROMPT_TEMPLATE, max_sequence_length=text.LLAMA_LENGTH
        )
    valid = mask.bool()
    torch.testing.assert_close(states[valid], theirs[0][valid])
    torch.testing.assert_close(pooled, theirs[1])
    assert torch.equal(mask, theirs[2].float())


def test_what_follows_a_prompt_changes_nothing(work):
    """The transformer is trained on 24 tokens; more of them, all padding, must not count."""
    pipe = export.build_pipeline(work, "distilled.pt")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in pipe.transformer.parameters():  # the first weights end in zeros, which would tell nothing
            weight.normal_(std=0.05, generator=generator)
    calls = {"height": SIZE, "width": SIZE, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    calls |= {"prompt_template": text.PROMPT_TEMPLATE, "guidance_scale": 3.5}
    pipe.set_progress_bar_config(disable=True)
    results = [
        pipe(PROMPTS[0], max_sequence_length=n, generator=torch.Generator().manual_seed(0), **calls).frames
        for n in (text.LLAMA_LENGTH, text.LLAMA_LENGTH + 9)
    ]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_a_pool_knows_its_clips_again(work):
    pool, autoencoder = latents.Pool(work), vae.load(work)
    assert len(pool) == 6 and pool.latents.shape[1:] == (16, 5, 8, 8)
    assert pool.latents.astype(np.float32).std() == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        expected = autoencoder.encode(vae.to_pixels([draw(pool.clip(3))])).latent_dist.mean[0]
    got = torch.from_numpy(pool.latents[3]).float() / pool.meta["scaling_factor"]
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)  # encoded in bfloat16
    clip = pool.clip(0)
    assert not is_held_out(clip.shape, clip.colour, clip.motion, clip.speed)


def test_the_way_of_the_noise_is_that_of_the_scheduler(work):
    """A model that knows the velocity arrives where it belongs, by the pipeline's scheduler."""
    batch = transformer.batch_at(latents.Pool(work), 0, 0, 4, dropout=0.0)
    x, t, velocity = transformer.noised(batch, torch.device("cpu"))
    torch.testing.assert_close(x - t[:, None, None, None, None] * velocity, batch.latents)
    sigmas = export.build_pipeline(work, "distilled.pt").scheduler
    sigmas.set_timesteps(sigmas=np.linspace(1.0, 0.0, 9)[:-1])
    plain = torch.linspace(1, 0, 9)[:-1]
    expected = transformer.SHIFT / (transformer.SHIFT + 1 / plain - 1)
    torch.testing.assert_close(sigmas.sigmas[:-1], expected, atol=1e-5, rtol=1e-5)


def test_both_stages_of_h2_cache_are_there(pipe):
    with h2cache.apply(pipe, h2cache.H2CacheConfig(tau1=1.0, tau2=1.0)) as handle:
        pipe(
            PROMPTS[0],
            height=SIZE,
            width=SIZE,
            num_frames=5,
            num_inference_steps=3,
            max_sequence_length=text.LLAMA_LENGTH,
            prompt_template=text.PROMPT_TEMPLATE,
            output_type="latent",
        )
        assert handle.trace.to_pandas()["stage"].nunique() == 2


def test_the_demo_shows_the_video_beside_the_uncached_one(folder):
    overrides = ["model=hunyuan-mini", f"model.path={folder}", f"model.num_frames={FRAMES}"]
    opened = studio.Studio.opened(overrides, threading.Lock())
    method = h2cache.H2CacheConfig(tau1=9, tau2=9)  # with another seed, as no training makes all steps alike
    whole, cached = opened.draw(studio.Task(PROMPTS[0], 0, 2)), opened.draw(studio.Task(PROMPTS[0], 1, 2), method)
    assert math.isinf(whole.fidelity(whole)) and math.isfinite(cached.fidelity(whole))
    assert opened.decisions(cached).width
    times = 256 // SIZE
    beside, single = (frames_of(studio.film(8, cached, reference)) for reference in (whole, None))
    for frames, videos in ((beside, 3), (single, 1)):
        assert np.shape(frames) == (FRAMES, times * SIZE, videos * times * SIZE, 3)
    left = np.asarray(whole.drawing.frames[0]).repeat(times, 0).repeat(times, 1)
    assert np.abs(beside[0][:, : left.shape[1]].astype(float) - left).mean() < 8  # but for the codec


def frames_of(shown: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(shown)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def test_latents_are_recorded_frame_by_frame(folder, pipe):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        model = instantiate(compose("run", ["model=hunyuan-mini", f"model.path={folder}"]).model, _convert_="all")
    found = recorded_latents(pipe, model, Prompt("p", PROMPTS[0], None), 0, 2, None)
    latent_frames = (FRAMES - 1) // pipe.vae_scale_factor_temporal + 1
    assert found.shape[:2] == (2, latent_frames) and found.shape[2] == pipe.transformer.config.in_channels * 8 * 8
    asked = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    (latents,) = pipe(PROMPTS[0], **model.call_arguments | asked, return_dict=False)[0]
    torch.testing.assert_close(found[-1], latents.transpose(0, 1).flatten(1))


def test_run_py_draws_a_video(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["model=hunyuan-mini", f"model.path={folder}", "model.num_inference_steps=2", f"prompt={PROMPTS[0]}"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "out=star.mp4"])
    run.main()
    assert "left out" not in capsys.readouterr().err
    with av.open(tmp_path / "star.mp4") as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert np.shape(frames) == (FRAMES, SIZE, SIZE, 3)
    assert Image.open(tmp_path / "star.png").height == SIZE and (tmp_path / "star.trace.csv").exists()


def test_run_py_refuses_a_template_without_a_place_for_the_prompt(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argument = "model.prompt_template={template: nothing, crop_start: 0}"
    monkeypatch.setattr(sys, "argv", ["run.py", "model=hunyuan-mini", f"model.path={folder}", argument])
    with pytest.raises(SystemExit):
        run.main()
    assert "prompt_template" in capsys.readouterr().err


def test_the_whole_model_is_small_enough(folder):
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    assert sum(sizes) <= 14 * 2**20 and max(sizes) <= 15 * 2**20
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "HunyuanVideoPipeline"
