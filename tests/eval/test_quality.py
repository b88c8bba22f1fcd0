"""Metrics by name: ours against formulas, pyiqa's wired as their papers say, and a reason for what cannot be had."""

import math
import os
import socket
import urllib.error
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image, ImageFilter

from h2cache.eval.errors import UserError
from h2cache.eval.metrics import pyiqa_metrics, weights
from h2cache.eval.metrics.images import psnr, ssim
from h2cache.eval.metrics.pyiqa_metrics import to_tensor
from h2cache.eval.metrics.reader import WEIGHTS, Reader, WordReader
from h2cache.eval.metrics.registry import Metrics, kind
from h2cache.eval.metrics.signs import SIZE, Signs
from tools.flux_mini.attributes import signs
from tools.flux_mini.export_reader import export, own_error
from tools.flux_mini.reader import held_out_scenes
from tools.flux_mini.scenes import Scene, draw

STOP = Scene("octagonal sign", "red", "STOP", "white", "straight", "bold", "plain", "blue")
PROMPT = 'a red octagonal sign that says "STOP"'


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    """No test finds out whether there is one: names do not resolve, and caches are empty."""

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    torch_home = tmp_path_factory.mktemp("torch")
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(torch_home / "hub/pyiqa"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(torch_home / "huggingface"))
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def picture(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Smooth noise in RGB."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))


def one(name: str, image: Image.Image, reference: Image.Image | None = None, word: str | None = None) -> float:
    return Metrics([name]).score(name, image, reference, PROMPT, word)


# Names


def test_pyiqa_s_own_description_says_what_a_metric_needs():
    kinds = map(kind, ("lpips", "clipiqa", "niqe", "fsim"))
    told = {each.name: (each.needs_reference, each.lower_is_better) for each in kinds}
    assert told == {"lpips": (True, True), "clipiqa": (False, False), "niqe": (False, True), "fsim": (True, False)}
    assert (kind("psnr").label, kind("clipscore").label, kind("fsim").label) == ("PSNR, dB", "CLIPScore", "fsim")


@pytest.mark.parametrize(
    ("name", "near"),
    [("clipiq", "clipiqa"), ("LPIPS", "lpips"), ("word_acuracy", "word_accuracy"), ("fid", "fsim"), ("x9", "psnr")],
)
def test_a_name_that_is_no_metric_gets_near_ones(name, near):
    """fid is pyiqa's, but compares folders."""
    with pytest.raises(UserError, match=rf"'{name}' is no metric of a single image; did you mean .*\b{near}\b"):
        Metrics(["psnr", name])


# Against formulas


def test_psnr_and_ssim_are_ours():
    """A difference of 10 in every channel is 20 log10(25.5) dB."""
    gray, lighter = Image.new("RGB", (32, 32), (100,) * 3), Image.new("RGB", (32, 32), (110,) * 3)
    assert one("psnr", gray, lighter) == psnr(gray, lighter) == pytest.approx(20 * math.log10(25.5))
    assert one("psnr", gray, gray) == math.inf
    a, b = picture(0), picture(1)
    assert one("ssim", a, b) == ssim(a, b) < one("ssim", a, a) == 1


@pytest.mark.parametrize("name", ["psnr", "gmsd"])
def test_images_of_different_sizes_are_refused(name):
    with pytest.raises(ValueError, match=r"different size: \(96, 64\) and \(64, 64\)"):
        one(name, picture(), picture(size=(64, 64)))


def test_a_reference_metric_of_pyiqa_s():
    """Of greys, the PSNR of the luma is that of any channel."""
    gray, lighter = Image.new("RGB", (32, 32), (100,) * 3), Image.new("RGB", (32, 32), (110,) * 3)
    assert one("psnry", gray, lighter) == pytest.approx(20 * math.log10(25.5), rel=1e-5)
    assert one("gmsd", picture(), picture()) == pytest.approx(0, abs=1e-6) and one("gmsd", picture(0), picture(1)) > 0.1


def test_no_reference_no_score():
    metrics = Metrics(["psnr", "ssim", "gmsd", "word_accuracy"])
    assert all(math.isnan(metrics.score(name, picture(), None, PROMPT, None)) for name in metrics.metrics)
    assert not metrics.unavailable


def test_pixels_are_rgb_from_0_to_1():
    image = Image.new("RGBA", (3, 2), (255, 51, 0, 128))
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 2, 3) and tensor.dtype == torch.float32
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([1, 0.2, 0])


@pytest.mark.parametrize("scale", [255, -1])
def test_pixels_of_another_range_are_refused(scale):
    """Such as 0 to 255."""
    network = pyiqa_metrics.load("gmsd", torch.device("cpu"))
    right, wrong = to_tensor(picture()), scale * to_tensor(picture())
    for pixels in ((wrong, right), (right, wrong)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            network.score(*pixels, PROMPT)


# CLIP-IQA, on a small CLIP of random weights in OpenAI's form


def save_random_clip(path: Path, seed: int = 0) -> torch.nn.Module:
    """A ResNet CLIP of one block a stage, as the TorchScript archive that RN50.pt is; returns the model.

    Its values fit half precision, through which the loader takes OpenAI's.
    """
    from pyiqa.archs.clip_model import CLIP

    torch.manual_seed(seed)
    model = CLIP(32, 64, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 2).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_var", "bn3.weight")):
                tensor.uniform_(0.5, 1.5)  # the weight is zero at first, and with it all that a block adds
            elif name.endswith("running_mean"):
                tensor.uniform_(-0.2, 0.2)
            elif "attnpool" in name and "proj" in name:
                tensor.mul_(0 if name.endswith("bias") else 3)  # so that images differ in what they are, after all
            tensor.copy_(tensor.half())
    example = torch.rand(1, 3, 64, 64), torch.randint(1, 100, (2, 77))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are what they are
        torch.jit.save(torch.jit.trace(model, example, check_trace=False), path)
    return model


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("clip") / "RN50.pt"
    return path, save_random_clip(path)


def attention_pool(features: torch.Tensor, state: dict[str, torch.Tensor], heads: int) -> torch.Tensor:
    """CLIP's attention pooling of (C, h, w) features without positional embedding, from its mean token (C)."""
    tokens = features.flatten(1).T
    tokens = torch.cat([tokens.mean(dim=0, keepdim=True), tokens])

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"visual.attnpool.{name}.weight"], state[f"visual.attnpool.{name}.bias"])

    query, key, value = project("q_proj", tokens[:1]), project("k_proj", tokens), project("v_proj", tokens)
    query, key, value = (x.reshape(len(x), heads, -1).transpose(0, 1) for x in (query, key, value))
    weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return project("c_proj", (weights @ value).transpose(0, 1).reshape(-1))


def clip_iqa(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """CLIP-IQA, section 3.1: the softmax over an antonym pair of the scaled cosines, the image without positional
    embedding. Of CLIP only the convolutions and the text transformer are used as they are."""
    from pyiqa.archs.clip_imports import clip

    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    seen = (pixels - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        visual, features = model.visual, seen
        for number in "123":
            convolution, norm = (getattr(visual, name + number) for name in ("conv", "bn"))
            features = norm(convolution(features)).relu()
        features = visual.avgpool(features)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            features = stage(features)
        image = attention_pool(features[0], model.state_dict(), heads=4)
        texts = model.encode_text(clip.tokenize(["Good photo.", "Bad photo."]))
    cosines = F.cosine_similarity(image[None], texts, dim=-1)
    return (model.logit_scale.exp() * cosines).softmax(dim=-1)[0].item()


def test_clipiqa_from_a_local_checkpoint_is_clip_iqa(random_clip):
    path, model = random_clip
    metrics = Metrics(["clipiqa"], weights=path.parent)
    assert not metrics.unavailable
    scores = {}
    for seed, size in ((0, (96, 64)), (1, (128, 128)), (2, (64, 160))):
        image = picture(seed, size)
        scores[seed] = metrics.score("clipiqa", image, None, "", None)
        assert scores[seed] == pytest.approx(clip_iqa(model, to_tensor(image)), abs=5e-6)
        assert scores[seed] == metrics.score("clipiqa", image, picture(3, size), PROMPT, "STOP"), "of the image alone"
    assert max(scores.values()) - min(scores.values()) > 1e-3 and all(0 < score < 1 for score in scores.values())


def test_clipiqa_refuses_pixels_of_0_to_255(random_clip):
    path, _ = random_clip
    network = pyiqa_metrics.load("clipiqa", torch.device("cpu"), [path])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        network.score(255 * to_tensor(picture()), None, "")


def test_networks_neither_train_nor_draw_from_anyone_s_randomness(random_clip):
    path, _ = random_clip
    metrics = Metrics(["clipiqa", "gmsd"], weights=path.parent)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = [metrics.score(name, picture(0), picture(1), PROMPT, None) for name in metrics.metrics]
    assert first == [metrics.score(name, picture(0), picture(1), PROMPT, None) for name in metrics.metrics]
    assert torch.equal(states[0], torch.random.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


def test_a_checkpoint_that_is_none(tmp_path):
    (tmp_path / "RN50.pt").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"metric_weights=.*: RN50.pt cannot be loaded as the weights of clipiqa"):
        Metrics(["clipiqa"], weights=tmp_path)


def test_versions_tell_scores_apart(random_clip, tmp_path):
    """Of the same weights they are equal, of another checkpoint another."""
    path, _ = random_clip
    save_random_clip(tmp_path / "RN50.pt", seed=1)
    names = ["psnr", "word_accuracy", "gmsd", "clipiqa"]
    a, b, c = (Metrics(names, folder) for folder in (path.parent, path.parent, tmp_path))
    assert [a.version(name) for name in a.metrics] == [b.version(name) for name in a.metrics]
    assert [name for name in a.metrics if a.version(name) != c.version(name)] == ["clipiqa"]


# What cannot be had


def test_without_a_network_the_rest_goes_on(monkeypatch, capfd, tmp_path):
    """At once: nobody sleeps between attempts. Nothing is printed, left behind, or left changed."""

    def sleep(seconds):
        raise AssertionError("somebody tries again")

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(["clipiqa", "lpips", "clipscore", "topiq_nr", "psnr"])
    reason = "its weights are not in the local cache, and there is no network to fetch them"
    assert metrics.unavailable == dict.fromkeys(["clipiqa", "lpips", "clipscore", "topiq_nr"], reason)
    assert all(math.isnan(metrics.score(name, picture(), picture(1), PROMPT, None)) for name in metrics.unavailable)
    assert metrics.score("psnr", picture(), picture(1), PROMPT, None) > 0
    assert capfd.readouterr() == ("", "")
    for folder in (tmp_path, Path(os.environ["HOME"]), Path(os.environ["TORCH_HOME"])):
        assert not list(folder.iterdir())
    assert socket.getdefaulttimeout() is None and not constants.HF_HUB_OFFLINE


def test_waiting_for_an_answer_has_an_end(monkeypatch):
    """pyiqa, clip and torch.hub give their sockets no timeout; what they open while a metric loads has one."""
    seen = []

    def create_metric(name, **options):
        seen.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr("pyiqa.create_metric", create_metric)
    monkeypatch.setattr("h2cache.eval.metrics.registry.is_online", lambda: True)
    assert Metrics(["lpips"]).unavailable == {"lpips": "its weights cannot be loaded (timed out)"}
    assert seen == [weights.FETCH_TIMEOUT] and socket.getdefaulttimeout() is None


def test_a_hub_that_answers_is_there(monkeypatch):
    """Whatever it answers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def answer(url, timeout):
        raise urllib.error.HTTPError(url, 429, "too many requests", None, None)

    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert weights.is_online()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not weights.is_online(), "the environment forbids to ask"


def test_a_missing_package_is_named():
    error = ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources")
    assert "pip install 'setuptools<82'" in weights.why_not_loaded(error, online=True)
    error = ModuleNotFoundError("No module named 'piq'", name="piq")
    assert weights.why_not_loaded(error, online=True) == "a package is missing (No module named 'piq')"


def test_a_metric_that_fails_on_an_image_says_so_and_is_asked_no_more(monkeypatch):
    metrics = Metrics(["gmsd", "ssim"])

    def fail(self, *args):
        raise RuntimeError("image too small\nsize: 8")

    monkeypatch.setattr(pyiqa_metrics.Network, "score", fail)
    assert math.isnan(metrics.score("gmsd", picture(), picture(), PROMPT, None))
    assert metrics.unavailable == {"gmsd": "it fails on an image of 96x64 (image too small)"}
    monkeypatch.undo()
    assert math.isnan(metrics.score("gmsd", picture(), picture(), PROMPT, None))
    assert metrics.score("ssim", picture(), picture(), PROMPT, None) == 1


# Words


def test_word_accuracy_is_of_the_whole_word():
    image = draw(STOP)
    metrics = Metrics(["word_accuracy"])

    def accuracy(image: Image.Image, word: str | None) -> float:
        return metrics.score("word_accuracy", image, None, PROMPT, word)

    assert accuracy(image, "STOP") == 1
    assert accuracy(image.convert("RGBA"), "STOP") == 1
    assert accuracy(image, "SHOP") == accuracy(image, "STO") == 0
    assert accuracy(Image.new("RGB", (SIZE, SIZE), "gray"), "STOP") == 0


@pytest.mark.parametrize("word", [None, "", "BALLY'S", "SEACREST BEACH", "stop"])
def test_words_that_the_reader_cannot_know_are_not_judged(word):
    assert math.isnan(one("word_accuracy", draw(STOP), word=word))


def test_pictures_by_other_models_are_not_judged():
    assert math.isnan(one("word_accuracy", draw(STOP).resize((256, 256)), word="STOP"))


def test_the_shipped_reader_reads_words_it_never_saw():
    """Its file says how often it errs."""
    reader = WordReader.load()
    assert WEIGHTS.stat().st_size < 1.5e6
    assert 0 < reader.own_error < 0.03
    scenes = held_out_scenes(seed=11, count=40)
    assert own_error(reader, scenes) <= 1 / 40
    assert not any(weight.requires_grad for weight in reader.network.parameters()) and not reader.network.training


def test_the_shipped_reader_knows_the_signs_that_the_tools_draw():
    shipped, drawn = WordReader.load().signs, signs()
    for name in (field.name for field in fields(Signs)):
        assert np.array_equal(getattr(shipped, name), getattr(drawn, name)), name


def test_export_rounds_measures_and_writes_whole(tmp_path):
    """A network of random weights reads nothing right, and says so in its file."""
    torch.manual_seed(0)
    network = Reader().eval()
    scenes = held_out_scenes(seed=0, count=3)
    exported = export(network, tmp_path / "reader.safetensors", scenes)
    loaded = WordReader.load(tmp_path / "reader.safetensors")
    assert exported.own_error == loaded.own_error == 1
    for (name, weight), kept in zip(network.state_dict().items(), loaded.network.state_dict().values(), strict=True):
        assert torch.equal(kept, weight.half().float() if weight.is_floating_point() else weight), name
    assert [path.name for path in tmp_path.iterdir()] == ["reader.safetensors"]
    assert (tmp_path / "reader.safetensors").stat().st_size < 1.5e6, "two bytes a weight, not four"


def test_a_reader_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("h2cache.eval.metrics.reader.WEIGHTS", tmp_path / "none.safetensors")
    metrics = Metrics(["word_accuracy"])
    assert metrics.unavailable["word_accuracy"].startswith("its weights cannot be loaded (")
    assert math.isnan(metrics.score("word_accuracy", draw(STOP), None, PROMPT, "STOP"))


def test_loading_a_metric_leaves_the_text_encoders_of_transformers_alone():
    """Two of pyiqa's networks replace parts of Llama when they are imported, and any metric may import them all."""
    from transformers.models.llama import configuration_llama, modeling_llama

    places = (configuration_llama, modeling_llama, modeling_llama.LlamaModel, modeling_llama.LlamaForCausalLM)
    before = [dict(vars(place)) for place in places]
    with pyiqa_metrics._llama_as_it_was():
        from pyiqa.archs.q_align.modeling_llama2 import replace_llama_modality_adaptive

        replace_llama_modality_adaptive()
        assert [dict(vars(place)) for place in places] != before
    assert [dict(vars(place)) for place in places] == before
