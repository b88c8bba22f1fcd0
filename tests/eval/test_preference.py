"""Learned metrics on small networks of random weights, in the form of their publishers' files, against the formulas.

The formulas are written out here on the checkpoints' own tensors: nothing of transformers' networks is used for them.
"""

import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from h2cache.eval.errors import UserError
from h2cache.eval.metrics.preference import CLIP_MEAN, CLIP_STD, REWARD_MEAN, REWARD_STD
from h2cache.eval.metrics.registry import Metrics, kind

PROMPTS = ('a red octagonal sign that says "STOP"', "two blue birds", "a " * 100)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "sign", "two", "birds", "says"]
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No test finds out whether there is a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("huggingface")))


def pictures() -> list[Image.Image]:
    """Smooth noise, one wide, one high, one square."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    wide = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
    return [wide, wide.rotate(90, expand=True), wide.resize((70, 70)).filter(ImageFilter.GaussianBlur(5))]


def random_weights(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Wide enough that every layer matters; the scales of norms are near 1."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) / (shape[-1] if shape else 1) ** 0.5 for name, shape in shapes.items()}
    norms = [name for name in shapes if name.endswith("weight") and ("ln_" in name or "norm" in name.lower())]
    return weights | {name: 1 + 0.3 * weights[name] for name in norms}


def attention(x: torch.Tensor, y: torch.Tensor, parts: list, heads: int, mask: torch.Tensor | float = 0.0):
    """Of (N, D) to (M, E); `parts` are the weight and bias of query, key and value."""
    query, key, value = (F.linear(z, *part) for z, part in zip((x, y, y), parts, strict=True))
    query, key, value = (z.reshape(len(z), heads, -1).transpose(0, 1) for z in (query, key, value))
    weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + mask).softmax(dim=-1)
    return (weights @ value).transpose(0, 1).reshape(len(x), -1)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


# HPSv2


def hps_checkpoint() -> Weights:
    """OpenCLIP's names: a text tower 32 wide with 2 layers, a visual one 48 wide with 3, 14 pixels a patch."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 32),
        "text_projection": (32, 24),
        "logit_scale": (),
        "visual.class_embedding": (48,),
        "visual.positional_embedding": (17, 48),
        "visual.proj": (48, 24),
        "visual.conv1.weight": (48, 3, 14, 14),
        "token_embedding.weight": (49408, 32),
    }
    for place, width in (("ln_final", 32), ("visual.ln_pre", 48), ("visual.ln_post", 48)):
        shapes |= {f"{place}.weight": (width,), f"{place}.bias": (width,)}
    for tower, width, layers in (("", 32, 2), ("visual.", 48, 3)):
        for k in range(layers):
            block = f"{tower}transformer.resblocks.{k}."
            shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
            sizes = {"ln_1": (width,), "ln_2": (width,), "attn.out_proj": (width, width)}
            sizes |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
            shapes |= {f"{block}{name}.weight": size for name, size in sizes.items()}
            shapes |= {f"{block}{name}.bias": size[:1] for name, size in sizes.items()}
    return random_weights(shapes)


def tower(x: torch.Tensor, w: Weights, prefix: str, layers: int, mask: torch.Tensor | float = 0.0) -> torch.Tensor:
    """CLIP's transformer on (N, D), 16 heads."""
    for k in range(layers):
        block = f"{prefix}transformer.resblocks.{k}."

        def two(name: str, block: str = block) -> tuple[torch.Tensor, torch.Tensor]:
            return w[f"{block}{name}.weight"], w[f"{block}{name}.bias"]

        y = F.layer_norm(x, x.shape[-1:], *two("ln_1"))
        inside = w[f"{block}attn.in_proj_weight"].chunk(3), w[f"{block}attn.in_proj_bias"].chunk(3)
        x = x + F.linear(attention(y, y, list(zip(*inside, strict=True)), 16, mask), *two("attn.out_proj"))
        y = F.layer_norm(x, x.shape[-1:], *two("ln_2"))
        x = x + F.linear(F.gelu(F.linear(y, *two("mlp.c_fc"))), *two("mlp.c_proj"))
    return x


def hps(w: Weights, image: Image.Image, prompt: str) -> float:
    """The cosine of the last class token and the token at the end of the text, both projected."""
    from pyiqa.archs.clip_imports import clip

    pixels = T.to_tensor(image)
    height, width = pixels.shape[1:]
    size = [round(side * 56 / max(height, width)) for side in (height, width)]
    top, left = (56 - size[0]) // 2, (56 - size[1]) // 2
    canvas = torch.zeros(3, 56, 56)
    canvas[:, top : top + size[0], left : left + size[1]] = T.resize(pixels, size, InterpolationMode.BICUBIC)
    patches = F.conv2d(T.normalize(canvas, CLIP_MEAN, CLIP_STD)[None], w["visual.conv1.weight"], stride=14)
    tokens = torch.cat([w["visual.class_embedding"][None], patches[0].flatten(1).T]) + w["visual.positional_embedding"]
    tokens = F.layer_norm(tokens, (48,), w["visual.ln_pre.weight"], w["visual.ln_pre.bias"])
    seen = F.layer_norm(tower(tokens, w, "visual.", 3)[0], (48,), w["visual.ln_post.weight"], w["visual.ln_post.bias"])
    ids = clip.tokenize([prompt], truncate=True)[0].long()
    words = w["token_embedding.weight"][ids] + w["positional_embedding"]
    causal = torch.full((77, 77), -math.inf).triu(1)
    words = F.layer_norm(tower(words, w, "", 2, causal), (32,), w["ln_final.weight"], w["ln_final.bias"])
    read = words[ids.argmax()] @ w["text_projection"]
    return float(unit(seen @ w["visual.proj"]) @ unit(read))


def test_hpsv2_from_its_checkpoint(tmp_path):
    weights = hps_checkpoint()
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "HPS_v2.1_compressed.pt")
    metrics = Metrics(["hpsv2"], weights=tmp_path)
    assert not metrics.unavailable
    compare(metrics, "hpsv2", lambda image, prompt: hps(weights, image, prompt))


def compare(metrics: Metrics, name: str, expected) -> None:
    """The metric's scores are the formula's, and tell images and prompts apart."""
    scores = {}
    for k, image in enumerate(pictures()):
        for prompt in PROMPTS:
            scores[k, prompt] = metrics.score(name, image, None, prompt, None)
            assert scores[k, prompt] == pytest.approx(expected(image, prompt), abs=3e-5)
    for k in range(3):
        assert len({round(scores[k, prompt], 3) for prompt in PROMPTS}) == 3
    assert len({round(scores[k, PROMPTS[0]], 3) for k in range(3)}) == 3


# ImageReward


def reward_checkpoint() -> Weights:
    """The names of ImageReward's BLIP: eyes 32 wide with 2 layers, a reader 48 wide with 2, a head of two layers."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, 32),
        "blip.visual_encoder.pos_embed": (1, 17, 32),
        "blip.visual_encoder.patch_embed.proj.weight": (32, 3, 8, 8),
        "blip.visual_encoder.patch_embed.proj.bias": (32,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (14, 48),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, 48),
        "blip.text_proj.weight": (8, 48),
    }
    sizes: dict[str, tuple[int, ...]] = {"blip.visual_encoder.norm": (32,)}
    for k in range(2):
        block = f"blip.visual_encoder.blocks.{k}."
        sizes |= {f"{block}norm1": (32,), f"{block}norm2": (32,), f"{block}attn.qkv": (96, 32)}
        sizes |= {f"{block}attn.proj": (32, 32), f"{block}mlp.fc1": (128, 32), f"{block}mlp.fc2": (32, 128)}
        layer = f"blip.text_encoder.encoder.layer.{k}."
        for part, other in (("attention", 48), ("crossattention", 32)):
            sizes |= {f"{layer}{part}.self.query": (48, 48), f"{layer}{part}.self.key": (48, other)}
            sizes |= {f"{layer}{part}.self.value": (48, other), f"{layer}{part}.output.dense": (48, 48)}
            sizes |= {f"{layer}{part}.output.LayerNorm": (48,), f"{layer}output.LayerNorm": (48,)}
        sizes |= {f"{layer}intermediate.dense": (96, 48), f"{layer}output.dense": (48, 96)}
    sizes |= {"blip.text_encoder.embeddings.LayerNorm": (48,), "mlp.layers.0": (16, 48), "mlp.layers.2": (1, 16)}
    shapes |= {f"{name}.weight": size for name, size in sizes.items()}
    shapes |= {f"{name}.bias": size[:1] for name, size in sizes.items()}
    return random_weights(shapes) | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def reward(w: Weights, image: Image.Image, ids: list[int]) -> float:
    """BLIP's reader on the prompt's `ids`, with cross-attention to what its eyes see; the head on its first token."""

    def two(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return w[f"{name}.weight"], w[f"{name}.bias"]

    small = T.center_crop(T.resize(image, 32, InterpolationMode.BICUBIC), 32)
    pixels = T.normalize(T.to_tensor(small), CLIP_MEAN, CLIP_STD)
    eyes = "blip.visual_encoder."
    patches = F.conv2d(pixels[None], *two(f"{eyes}patch_embed.proj"), stride=8)[0].flatten(1).T
    x = torch.cat([w[f"{eyes}cls_token"][0], patches]) + w[f"{eyes}pos_embed"][0]
    for k in range(2):
        block = f"{eyes}blocks.{k}."
        y = F.layer_norm(x, (32,), *two(f"{block}norm1"), eps=1e-6)
        parts = list(zip(*(each.chunk(3) for each in two(f"{block}attn.qkv")), strict=True))
        x = x + F.linear(attention(y, y, parts, 16), *two(f"{block}attn.proj"))
        y = F.layer_norm(x, (32,), *two(f"{block}norm2"), eps=1e-6)
        x = x + F.linear(F.gelu(F.linear(y, *two(f"{block}mlp.fc1"))), *two(f"{block}mlp.fc2"))
    seen = F.layer_norm(x, (32,), *two(f"{eyes}norm"), eps=1e-6)

    mouth = "blip.text_encoder."
    x = w[f"{mouth}embeddings.word_embeddings.weight"][ids]
    x = x + w[f"{mouth}embeddings.position_embeddings.weight"][: len(ids)]
    x = F.layer_norm(x, (48,), *two(f"{mouth}embeddings.LayerNorm"), eps=1e-12)
    for k in range(2):
        layer = f"{mouth}encoder.layer.{k}."
        for part in ("attention", "crossattention"):
            parts = [two(f"{layer}{part}.self.{each}") for each in ("query", "key", "value")]
            y = F.linear(
                attention(x, x if part == "attention" else seen, parts, 12), *two(f"{layer}{part}.output.dense")
            )
            x = F.layer_norm(x + y, (48,), *two(f"{layer}{part}.output.LayerNorm"), eps=1e-12)
        y = F.linear(F.gelu(F.linear(x, *two(f"{layer}intermediate.dense"))), *two(f"{layer}output.dense"))
        x = F.layer_norm(x + y, (48,), *two(f"{layer}output.LayerNorm"), eps=1e-12)
    judged = F.linear(F.linear(x[0], *two("mlp.layers.0")), *two("mlp.layers.2"))
    return (judged.item() - REWARD_MEAN) / REWARD_STD


def test_imagereward_from_its_checkpoint(tmp_path):
    """Words that the vocabulary lacks are [UNK], a prompt ends after 35 tokens, and padding is not read."""
    weights = reward_checkpoint()
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased/vocab.txt").write_text("\n".join(WORDS))
    ids = {
        PROMPTS[0]: [2, 5, 6, 1, 8, 1, 11, 1, 1, 1, 3],  # the quotation marks are words of their own
        PROMPTS[1]: [2, 9, 7, 10, 3],
        PROMPTS[2]: [2, *[5] * 33, 3],
    }
    metrics = Metrics(["imagereward"], weights=tmp_path)
    assert not metrics.unavailable
    compare(metrics, "imagereward", lambda image, prompt: reward(weights, image, ids[prompt]))


# PickScore and the CLIP-IQA of H2-Cache's paper


def save_clip(folder: Path) -> CLIPModel:
    """A small CLIP as transformers keeps one: model, processor and a vocabulary of letters."""
    letters = [*map(chr, range(33, 127))]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    end = len(vocabulary) - 1
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = text | {"hidden_size": 48, "image_size": 56, "patch_size": 14}
    text |= {"vocab_size": len(vocabulary), "max_position_embeddings": 77}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "logit_scale" not in name:
                parameter.copy_(torch.randn(parameter.shape) / max(1, parameter.shape[-1]) ** 0.5)
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return model


def cosines(model: CLIPModel, image: Image.Image, texts: list[str]) -> torch.Tensor:
    """(B,): of the image, its shorter side resized, and of texts that are spelt letter by letter."""
    end = model.config.text_config.eos_token_id
    letters = {chr(33 + k): k for k in range(94)}

    def spelt(text: str) -> torch.Tensor:
        words = re.findall(r"[a-z]+|[^a-z ]", text.lower())
        ids = [k for word in words for k in [*(letters[c] for c in word[:-1]), 94 + letters[word[-1]]]]
        return torch.tensor([[end - 1, *ids[:75], end]])

    small = T.center_crop(T.resize(image, 56, InterpolationMode.BICUBIC), 56)
    pixels = T.normalize(T.to_tensor(small), CLIP_MEAN, CLIP_STD)[None]
    with torch.no_grad():
        seen = unit(model.visual_projection(model.vision_model(pixels).pooler_output)[0])
        hidden = [model.text_model(spelt(text)).last_hidden_state[0, -1] for text in texts]
        return torch.stack([seen @ unit(model.text_projection(each)) for each in hidden])


def test_pickscore_from_its_folder(tmp_path):
    model = save_clip(tmp_path / "PickScore_v1")
    metrics = Metrics(["pickscore"], weights=tmp_path)
    assert not metrics.unavailable
    for image in pictures():
        for prompt in ("a red sign", "two blue birds", "a " * 100):
            expected = model.logit_scale.exp() * cosines(model, image, [prompt])
            assert metrics.score("pickscore", image, None, prompt, None) == pytest.approx(expected.item(), abs=0.05)


def test_clipiqa_as_published_is_of_pixels_in_the_right_range(tmp_path):
    """The published code hands 0 to 255 to torchmetrics, whose image processor divides by 255 whatever it is told."""
    model = save_clip(tmp_path / "clip-vit-large-patch14")
    metrics = Metrics(["clipiqa_published"], weights=tmp_path)
    assert not metrics.unavailable
    odds = []
    for image in (picture.resize((56, 56)) for picture in pictures()):
        good, bad = cosines(model, image, ["Good photo.", "Bad photo."]).tolist()
        score = metrics.score("clipiqa_published", image, None, "a sign", None)
        odds.append(math.log(score / (1 - score)))
        assert odds[-1] == pytest.approx(100 * (good - bad), abs=1e-2)
    assert max(odds) - min(odds) > 1


# pyiqa's, from the folder


def test_lpips_from_the_folder(tmp_path):
    """Differences of unit features of AlexNet's five layers, weighted by channel, averaged over the image."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    network = alexnet(weights=None).eval()
    channels = (64, 192, 384, 256, 256)
    lins = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(channels)}
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth")
    torch.save(lins, tmp_path / "LPIPS_v0.1_alex-df73285e.pth")
    metrics = Metrics(["lpips"], weights=tmp_path)
    assert not metrics.unavailable
    a, b = (image.resize((96, 96)) for image in pictures()[:2])

    def features(image: Image.Image) -> list[torch.Tensor]:
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
        x, found = ((2 * T.to_tensor(image) - 1 - shift) / scale)[None], []
        for k, layer in enumerate(network.features):
            x = layer(x)
            if k in (1, 4, 7, 9, 11):
                found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    with torch.no_grad():
        differences = [(x - y) ** 2 for x, y in zip(features(a), features(b), strict=True)]
    expected = sum((d * w).sum(dim=1).mean().item() for d, w in zip(differences, lins.values(), strict=True))
    assert metrics.score("lpips", a, b, "", None) == pytest.approx(expected, rel=1e-4)
    assert metrics.score("lpips", a, a, "", None) == 0


def test_clipscore_from_the_folder(tmp_path):
    """2.5 times the cosine of the image and "A photo depicts" with the prompt, and not below 0."""
    from clip.model import CLIP
    from pyiqa.archs.clip_imports import clip

    torch.manual_seed(0)
    model = CLIP(24, 56, 2, 64, 14, 77, 49408, 64, 1, 2).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.half())
        model.text_projection.neg_()  # of this seed: the cosines are above 0 then
    example = torch.rand(1, 3, 56, 56), torch.randint(1, 100, (1, 77))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are what they are
        torch.jit.save(torch.jit.trace(model, example, check_trace=False), tmp_path / "ViT-B-32.pt")
    metrics = Metrics(["clipscore"], weights=tmp_path)
    assert not metrics.unavailable
    scores = []
    for image in pictures():
        for prompt in PROMPTS[:2]:
            small = T.center_crop(T.resize(T.to_tensor(image), 56, InterpolationMode.BICUBIC), 56)
            with torch.no_grad():
                seen = unit(model.encode_image(T.normalize(small, CLIP_MEAN, CLIP_STD)[None])[0])
                read = unit(model.encode_text(clip.tokenize([f"A photo depicts {prompt}"]))[0])
            scores.append(metrics.score("clipscore", image, None, prompt, None))
            assert scores[-1] == pytest.approx(2.5 * max(0, float(seen @ read)), abs=1e-4)
    assert max(scores) > 0 and len({round(score, 3) for score in scores}) > 3


# What cannot be had

LEARNED = ["imagereward", "hpsv2", "pickscore", "clipiqa_published"]


def test_each_missing_weight_is_one_sentence_and_no_score():
    metrics = Metrics(LEARNED)
    reason = "its weights are not in the local cache, and there is no network to fetch them"
    assert metrics.unavailable == dict.fromkeys(LEARNED, reason)
    assert all(math.isnan(metrics.score(name, pictures()[0], None, PROMPTS[0], None)) for name in LEARNED)


@pytest.mark.parametrize(
    ("name", "file"),
    [("hpsv2", "HPS_v2.1_compressed.pt"), ("pickscore", "PickScore_v1"), ("lpips", "LPIPS_v0.1_alex-df73285e.pth")],
)
def test_a_damaged_file_is_the_users_to_mend(tmp_path, name, file):
    if file == "PickScore_v1":
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_bytes(b"<html>404</html>")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth").write_bytes(b"")
    with pytest.raises(UserError, match=rf"metric_weights={tmp_path}: .*{file}.* cannot be loaded .* of {name}"):
        Metrics([name], weights=tmp_path)


def test_scores_of_other_weights_are_kept_apart(tmp_path):
    save_clip(tmp_path / "PickScore_v1")
    names = ["pickscore", "psnr"]

    def versions(folder: Path | None) -> list[str]:
        metrics = Metrics(names, weights=folder)
        return [metrics.version(name) for name in names]

    first, none = versions(tmp_path), versions(None)
    with (tmp_path / "PickScore_v1/config.json").open("a") as file:
        file.write("\n")
    second = versions(tmp_path)
    assert (
        len({each[0] for each in (first, second, none)}) == 3 and len({each[1] for each in (first, second, none)}) == 1
    )


def test_a_reward_has_no_change_in_percent():
    """Its zero is the mean of the training data."""
    assert not kind("imagereward").has_zero and kind("pickscore").has_zero
