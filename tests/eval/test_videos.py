"""Videos from run.py: the MP4, its contact sheet, the comparison. On a tiny random Wan with all its parts."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from families import video
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from repository import REPOSITORY
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

import h2cache
import run
from h2cache.baselines import BlockCacheConfig
from h2cache.eval.cli import draw as job
from h2cache.eval.cli import terminal as report
from h2cache.eval.generation.generate import Drawing
from h2cache.eval.generation.videos import GAP, contact_sheet, shown, write_mp4
from h2cache.eval.metrics.images import psnr, ssim
from h2cache.eval.models.pipelines import load_pipeline

PROMPT = "a red cat"
SIZE = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 6}
TOKENS = 12


def save(folder: Path, **parts) -> Path:
    """Write a WanPipeline of random weights that `from_pretrained` loads without a network."""
    letters = [(chr(code), -2.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    tokenizer = T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
    width = {"d_model": video.TEXT_WIDTH, "d_kv": 12, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    config = UMT5Config(vocab_size=len(tokenizer), **width)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=video.seeded(3, UMT5EncoderModel, config=config),
        vae=video.wan_vae(),
        scheduler=video.wan_scheduler(),
        transformer=video.wan_transformer(),
        **parts,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """As TI2V 5B: one transformer."""
    return save(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def wan_a14b(tmp_path_factory) -> Path:
    """As T2V A14B: another transformer for the later steps."""
    return save(
        tmp_path_factory.mktemp("models") / "wan", transformer_2=video.wan_transformer(seed=1), boundary_ratio=0.8
    )


@pytest.fixture(scope="module")
def pipe(wan: Path) -> DiffusionPipeline:
    return video.quiet(WanPipeline.from_pretrained(wan, dtype=torch.float32, local_files_only=True))


def arguments_for(folder: Path, model: str = "wan2.2-ti2v-5b", **changes) -> list[str]:
    call = SIZE | {"dtype": "float32", "device": "cpu", "max_sequence_length": TOKENS} | changes
    return [f"model={model}", f"model.path={folder}", *(f"model.{field}={value}" for field, value in call.items())]


def drawn_directly(pipe: DiffusionPipeline, **changes) -> list[Image.Image]:
    """The frames that the library draws, with the guidance scale of configs/model/wan2.2-ti2v-5b.yaml."""
    call = SIZE | {"guidance_scale": 5.0, "max_sequence_length": TOKENS} | changes
    return pipe(prompt=PROMPT, generator=torch.manual_seed(0), output_type="pil", **call).frames[0]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("seed=x")` runs run.py's main in `tmp_path`; returns its exit code, stdout and stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["run.py", f"prompt={PROMPT}", *arguments])
        code = 0
        try:
            run.main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return command


def read(file: Path) -> tuple[float, list[np.ndarray]]:
    """(frames a second, the frames) of a video."""
    with av.open(file) as container:
        stream = container.streams.video[0]
        return float(stream.average_rate), [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def pixels(image: Path | Image.Image) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


def tiles(sheet: np.ndarray, row: int = 0) -> list[np.ndarray]:
    """The pictures in a row of a contact sheet of frames of `SIZE`."""
    height, width = SIZE["height"], SIZE["width"]
    top = row * (height + GAP)
    return [sheet[top : top + height, left : left + width] for left in range(0, sheet.shape[1], width + GAP)]


def test_a_video_its_contact_sheet_and_the_trace(wan, pipe, command, tmp_path):
    """What run.py writes is what the library draws."""
    fields = ["method=block_cache", "method.threshold=0.3", "out=cat.mp4"]
    code, stdout, stderr = command(*arguments_for(wan), *fields)
    assert (code, stderr) == (0, "")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cat.mp4", "cat.png", "cat.trace.csv", "cat.yaml"]

    with h2cache.apply(pipe, BlockCacheConfig(threshold=0.3)) as handle:
        frames = drawn_directly(pipe)
    picked = [0, 1, 2, 3, 5, 6, 7, 8]  # of nine
    assert all(map(np.array_equal, tiles(pixels(tmp_path / "cat.png")), [pixels(frames[k]) for k in picked]))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "cat.trace.csv"), handle.trace.to_pandas(), check_dtype=False)
    decisions = set(handle.trace.to_pandas()["decision"])
    assert {"hit", "compute"} <= decisions  # so that the method made a difference

    fps, stored = read(tmp_path / "cat.mp4")
    assert (fps, len(stored), stored[0].shape) == (24, 9, (32, 48, 3))
    errors = [np.abs(one.astype(float) - pixels(other)).mean() for one, other in zip(stored, frames, strict=True)]
    steps = [np.abs(pixels(a).astype(float) - pixels(b)).mean() for a, b in pairwise(frames)]
    assert max(errors) < min(steps) / 2  # lossy, but each frame is in its place
    assert OmegaConf.load(tmp_path / "cat.yaml").model.num_frames == 9
    assert "48x32, 9 frames at 24 a second, 6 steps" in stdout
    assert "network cond" in stdout and "network uncond" in stdout


def test_a_comparison_of_videos(command, wan, pipe, tmp_path):
    code, stdout, stderr = command(*arguments_for(wan), "method=block_cache", "method.threshold=0.3", "compare=true")
    assert (code, stderr) == (0, "")
    names = ["image.compare.png", "image.mp4", "image.png", "image.trace.csv", "image.yaml"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names

    baseline = drawn_directly(pipe)
    with h2cache.apply(pipe, BlockCacheConfig(threshold=0.3)):
        cached = drawn_directly(pipe)
    sheet = pixels(tmp_path / "image.compare.png")
    assert sheet.shape == (2 * 32 + GAP, 8 * 48 + 7 * GAP, 3)
    assert np.array_equal(tiles(sheet, 0)[-1], pixels(baseline[-1]))
    assert np.array_equal(tiles(sheet, 1)[-1], pixels(cached[-1]))
    distances = [psnr(one, other) for one, other in zip(cached, baseline, strict=True)]
    similarity = np.mean([ssim(one, other) for one, other in zip(cached, baseline, strict=True)])
    assert f"PSNR per frame {np.mean(distances):.2f} dB in the mean" in stdout
    assert f"{min(distances):.2f} dB at the worst (frame {np.argmin(distances)})" in stdout
    assert f"SSIM {similarity:.4f} in the mean" in stdout


def test_two_transformers_share_the_steps_of_a_video(command, wan_a14b, tmp_path):
    code, _, stderr = command(*arguments_for(wan_a14b, "wan2.2-t2v-a14b"), "method=block_cache", "method.threshold=0.3")
    assert (code, stderr) == (0, "")
    trace = pd.read_csv(tmp_path / "image.trace.csv")
    assert trace["run"].nunique() == 2 and len(trace) == 2 * SIZE["num_inference_steps"]
    assert (read(tmp_path / "image.mp4")[0], len(read(tmp_path / "image.mp4")[1])) == (16, 9)


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_the_files_of_a_video_appear_all_or_not_at_all(command, monkeypatch, wan, tmp_path, error):
    (tmp_path / "image.mp4").write_text("the video of an earlier run")

    def half(frames, fps, file):
        file.write_text("half")
        raise error

    monkeypatch.setattr(job, "write_mp4", half)
    code, stdout, stderr = command(*arguments_for(wan, num_inference_steps=1), "method=none")
    assert code != 0 and stdout == "" and stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the video of an earlier run"]


def test_a_folder_in_the_place_of_the_video_is_said_before_anything_is_loaded(command, tmp_path):
    (tmp_path / "image.mp4").mkdir()
    code, _, stderr = command(*arguments_for(Path("nowhere")))
    assert code == 2 and "image.mp4: it is a folder" in stderr


def test_another_number_of_frames_than_asked_for_is_noted(command, wan, tmp_path):
    code, stdout, stderr = command(*arguments_for(wan, num_frames=7, num_inference_steps=1), "method=none")
    assert (code, stderr) == (0, "note: asked for 48x32 and 7 frames, the pipeline made 48x32 and 5 frames\n")
    assert "48x32, 5 frames" in stdout and len(read(tmp_path / "image.mp4")[1]) == 5


def test_what_the_pipeline_refuses_is_one_sentence(command, wan, tmp_path):
    """One transformer has no use for a second guidance scale."""
    code, stdout, stderr = command(*arguments_for(wan, "wan2.2-t2v-a14b"))
    assert (code, stdout, stderr.count("\n"), list(tmp_path.iterdir())) == (2, "", 1, [])
    assert "guidance_scale_2" in stderr


def test_a_video_pipeline_under_the_configuration_of_an_image_model(command, wan, tmp_path):
    fields = ["model.dtype=float32", "model.device=cpu"]
    code, _, stderr = command("model=sd3.5-large", f"model.path={wan}", *fields)
    assert (code, stderr.count("\n"), list(tmp_path.iterdir())) == (2, 1, [])
    assert f"{wan} makes videos (WanPipeline)" in stderr and "num_frames" in stderr


def test_the_vae_has_a_type_of_its_own_and_decodes_in_tiles_if_asked(wan):
    config = instantiate(OmegaConf.load(REPOSITORY / "configs/model/wan2.2-ti2v-5b.yaml"))
    config = replace(config, path=str(wan), device="cpu")
    pipe = load_pipeline(config)
    assert (pipe.vae.dtype, pipe.transformer.dtype, pipe.vae.use_tiling) == (torch.float32, torch.bfloat16, False)
    pipe = load_pipeline(replace(config, vae_dtype=None, vae_tiling=True))
    assert (pipe.vae.dtype, pipe.vae.use_tiling) == (torch.bfloat16, True)


def test_experiments_take_no_video_model(monkeypatch, tmp_path, capsys):
    from h2cache.eval import __main__ as program

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval", "model=wan2.2-ti2v-5b"])
    with pytest.raises(SystemExit) as exit:
        program.main()
    assert exit.value.code == 2
    assert "model=wan2.2-ti2v-5b makes videos" in capsys.readouterr().err


def test_the_mp4_keeps_the_colours(tmp_path):
    colours = [(220, 30, 40), (30, 200, 60), (40, 60, 230), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
    write_mp4([Image.new("RGB", (64, 48), colour) for colour in colours], 5, tmp_path / "a.mp4")
    fps, frames = read(tmp_path / "a.mp4")
    assert fps == 5
    assert np.abs(np.array([frame[24, 32] for frame in frames], int) - colours).max() <= 4


@pytest.mark.parametrize(
    ("count", "indices"),
    [(1, [0]), (3, [0, 1, 2]), (8, [*range(8)]), (81, [0, 11, 23, 34, 46, 57, 69, 80])],
)
def test_a_contact_sheet_has_frames_at_even_distances(count, indices):
    assert shown(count) == indices


def test_a_contact_sheet_shrinks_wide_frames_and_leaves_small_ones():
    wide, small = [Image.new("RGB", (1280, 720))] * 81, [Image.new("RGB", (48, 32))] * 2
    assert contact_sheet(wide).size == (8 * 256 + 7 * GAP, 144)
    assert contact_sheet(small, small).size == (2 * 48 + GAP, 2 * 32 + GAP)


def drawing(*levels: int) -> Drawing:
    frames = tuple(Image.new("RGB", (16, 16), (level,) * 3) for level in levels)
    return Drawing(frames, True, 1.0, 1.0, 1.0)


def test_frames_that_are_equal_do_not_make_the_mean_infinite():
    """Frames 1 and 2 are 10 and 20 levels off."""
    likeness = report.comparison(drawing(100, 110, 120), drawing(100, 100, 100))["likeness"]
    first, second = (20 * np.log10(255 / off) for off in (10, 20))
    assert likeness.startswith(
        f"PSNR per frame {(first + second) / 2:.2f} dB in the mean over the 2 frames that differ, "
        f"{second:.2f} dB at the worst (frame 2), SSIM "
    )
    assert report.comparison(drawing(1, 2), drawing(1, 2))["likeness"] == "identical videos, SSIM 1.0000"


def test_a_video_is_no_image():
    with pytest.raises(ValueError, match="a video of 2 frames"):
        _ = drawing(1, 2).image
