"""Metrics learned from what people prefer: PickScore, HPSv2 and ImageReward. And CLIP-IQA as H2-Cache's paper has it.

Each is a network of transformers with its publisher's weights. HPSv2's and ImageReward's own packages need libraries of
2023; their checkpoints are read here with the names of transformers' tensors instead.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from h2cache.eval.metrics.metric import Means, Metric, Scorer, Shown
from h2cache.eval.metrics.weights import loaded

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GOOD, BAD = "Good photo.", "Bad photo."
CLIPIQA_SCALE = 100  # of the cosines, in torchmetrics
HPS_HEADS = 16  # of ViT-H/14, in both towers; not to be seen from the shapes of the weights
IMAGE_HEADS, TEXT_HEADS = 16, 12  # of ImageReward's BLIP
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # over ImageReward's training data
REWARD_TOKENS = 35  # of a prompt, padded or cut

# From the tensors of OpenCLIP's and of BLIP's checkpoints to those of transformers.
CLIP_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
BLIP_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
)

PICKSCORE_FILES = ("PickScore_v1",)
HPS_FILES = ("HPS_v2.1_compressed.pt",)
REWARD_FILES = ("ImageReward.pt", "bert-base-uncased")
PUBLISHED_FILES = ("clip-vit-large-patch14",)


# PickScore, and CLIP-IQA of H2-Cache's paper: a folder of transformers each.


def load_pickscore(means: Means) -> Scorer:
    """PickScore v1 (Kirstain et al., 2023): the cosine of image and prompt in a CLIP trained on choices, scaled by its
    logit scale; about 20."""
    model, processor = _clip_of(means, "pickscore", PICKSCORE_FILES[0], "yuvalkirstain/PickScore_v1")

    @torch.no_grad()
    def pickscore(shown: Shown) -> float:
        cosine = _image_features(model, processor, shown.image) @ _text_features(model, processor, [shown.prompt]).T
        return float(model.logit_scale.exp() * cosine)

    return pickscore


def load_clipiqa_published(means: Means) -> Scorer:
    """What H2-Cache's paper is taken to report as CLIP-IQA: 0.7693 without a cache and -0.07 % with it.

    Its own script could not be read. It runs on nunchaku, whose evaluation calls torchmetrics with CLIP ViT-L/14 and
    gives it pixels of 0 to 255, where its `data_range` of 1 expects 0 to 1. It does no harm: with this CLIP it
    leaves the scaling to transformers' image processor, which divides by 255 whatever it is given. So what differs from
    `clipiqa` is not the range of the pixels but the network, which sees the image at 224x224 and with positional
    embedding.
    """
    model, processor = _clip_of(means, "clipiqa_published", PUBLISHED_FILES[0], "openai/clip-vit-large-patch14")
    with torch.no_grad():
        texts = _text_features(model, processor, [GOOD, BAD])

    @torch.no_grad()
    def clipiqa(shown: Shown) -> float:
        cosines = _image_features(model, processor, shown.image) @ texts.T
        return float((CLIPIQA_SCALE * cosines).softmax(dim=-1)[0, 0])

    return clipiqa


def _clip_of(means: Means, name: str, folder: str, hub_id: str) -> tuple[Any, Any]:
    """A CLIPModel on its device, and its processor."""
    local = means.local([folder])

    def load() -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        source = local[0] if local else hub_id
        return CLIPModel.from_pretrained(source, dtype=torch.float32), CLIPProcessor.from_pretrained(source)

    model, processor = loaded(name, local, means.online, load)
    return _fixed(model, means), processor


def _image_features(model: Any, processor: Any, image: Image.Image) -> Tensor:
    """(1, D) of length 1."""
    pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    return _unit(model.get_image_features(pixel_values=pixels.to(model.device)).pooler_output)


def _text_features(model: Any, processor: Any, texts: list[str]) -> Tensor:
    """(B, D) of length 1; what is too long for the model is cut."""
    longest = model.config.text_config.max_position_embeddings
    tokens = processor(text=texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return _unit(model.get_text_features(**tokens.to(model.device)).pooler_output)


# HPSv2: an OpenCLIP checkpoint.


def load_hpsv2(means: Means) -> Scorer:
    """HPSv2.1 (Wu et al., 2023): the cosine of image and prompt in a CLIP ViT-H/14 trained on choices; about 0.3.

    The image's longer side becomes the network's 224 pixels, the rest is black, as in the authors' package.
    """
    local = means.local(HPS_FILES)
    model = _fixed(loaded("hpsv2", local, means.online, partial(_hps, local)), means)
    size = model.config.vision_config.image_size

    @torch.no_grad()
    def hpsv2(shown: Shown) -> float:
        from pyiqa.archs.clip_imports import clip

        tokens = clip.tokenize([shown.prompt], truncate=True).to(model.device)
        pixels = F.normalize(_letterboxed(F.to_tensor(shown.image.convert("RGB")), size), CLIP_MEAN, CLIP_STD)
        image = _unit(model.get_image_features(pixel_values=pixels.unsqueeze(0).to(model.device)).pooler_output)
        return float(image @ _unit(model.get_text_features(input_ids=tokens).pooler_output).T)

    return hpsv2


def _hps(local: tuple[Path, ...]) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    state = _checkpoint(local[0] if local else hf_hub_download("xswu/HPSv2", HPS_FILES[0]))["state_dict"]
    layers = _layers(state, "transformer.resblocks."), _layers(state, "visual.transformer.resblocks.")
    vocabulary, text_width = state["token_embedding.weight"].shape
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    shared = {"num_attention_heads": HPS_HEADS, "hidden_act": "gelu"}
    text = {
        "hidden_size": text_width,
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers[0],
        "vocab_size": vocabulary,
        "max_position_embeddings": len(state["positional_embedding"]),
        "eos_token_id": vocabulary - 1,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": layers[1],
        "patch_size": patch,
        "image_size": grid * patch,
    }
    config = CLIPConfig(
        text_config=text | shared, vision_config=vision | shared, projection_dim=state["text_projection"].shape[1]
    )
    model = CLIPModel(config)
    model.load_state_dict(_clip_state(state))
    return model


def _clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's tensors as transformers has them: three projections instead of one, and the last ones transposed."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if packed := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            layer = _renamed(f"{packed[1]}.", CLIP_NAMES)
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}self_attn.{projection}_proj.{packed[2]}"] = part
        else:
            last = name in ("visual.proj", "text_projection")
            renamed[_renamed(name, CLIP_NAMES)] = tensor.T if last else tensor
    return renamed


def _letterboxed(pixels: Tensor, size: int) -> Tensor:
    """(3, H, W) to (3, size, size): the longer side fits, the shorter one has black on both sides."""
    height, width = pixels.shape[1:]
    scale = size / max(height, width)
    height, width = round(height * scale), round(width * scale)
    resized = F.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return F.pad(resized, [left, top, size - width - left, size - height - top])


# ImageReward: BLIP with a head.


def load_imagereward(means: Means) -> Scorer:
    """ImageReward v1.0 (Xu et al., 2023): a BLIP that reads the prompt while it looks at the image, and a head trained
    on rankings; 0 is the mean and 1 the standard deviation over its training data."""
    local = means.local(REWARD_FILES)
    vision, text, head, tokenizer = loaded("imagereward", local, means.online, partial(_reward, local))
    vision, text, head = (_fixed(part, means) for part in (vision, text, head))
    size = vision.config.image_size

    @torch.no_grad()
    def imagereward(shown: Shown) -> float:
        resized = F.resize(shown.image.convert("RGB"), size, InterpolationMode.BICUBIC)
        pixels = F.normalize(F.to_tensor(F.center_crop(resized, size)), CLIP_MEAN, CLIP_STD)
        seen = vision(pixel_values=pixels.unsqueeze(0).to(means.device)).last_hidden_state
        tokens = tokenizer(
            shown.prompt, padding="max_length", truncation=True, max_length=REWARD_TOKENS, return_tensors="pt"
        ).to(means.device)
        read = text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state
        return (float(head(read[:, 0])) - REWARD_MEAN) / REWARD_STD

    return imagereward


def _reward(local: tuple[Path, ...]) -> tuple[nn.Module, nn.Module, nn.Module, Callable[..., Any]]:
    """Vision, text, head and tokenizer."""
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    path, words = local or (hf_hub_download("THUDM/ImageReward", REWARD_FILES[0]), "google-bert/bert-base-uncased")
    state = _checkpoint(path)
    seen, read, judged = (_part(state, prefix) for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp."))
    width, _, patch, _ = seen["patch_embed.proj.weight"].shape
    grid = round((seen["pos_embed"].shape[1] - 1) ** 0.5)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(seen["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=_layers(seen, "blocks."),
            num_attention_heads=IMAGE_HEADS,
            image_size=grid * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    vocabulary, text_width = read["embeddings.word_embeddings.weight"].shape
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(read["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(read, "encoder.layer."),
            num_attention_heads=TEXT_HEADS,
            max_position_embeddings=len(read["embeddings.position_embeddings.weight"]),
        ),
        add_pooling_layer=False,
    )
    # Its layers have no activations between them, and dropout, which has no weights, no effect when it judges.
    numbers = sorted({int(name.split(".")[1]) for name in judged})
    weights = [(judged[f"layers.{number}.weight"], judged[f"layers.{number}.bias"]) for number in numbers]
    head = nn.Sequential(*(nn.Linear(*reversed(weight.shape)) for weight, _ in weights))
    vision.load_state_dict({_renamed(name, BLIP_NAMES): tensor for name, tensor in seen.items()})
    text.load_state_dict({name: read[name] for name in text.state_dict()})
    head.load_state_dict(
        {
            f"{k}.{what}": part
            for k, pair in enumerate(weights)
            for what, part in zip(("weight", "bias"), pair, strict=True)
        }
    )
    return vision, text, head, BertTokenizer.from_pretrained(words)


# What they share.


def _fixed(model: Any, means: Means) -> Any:
    return model.to(means.device).eval().requires_grad_(False)


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def _checkpoint(path: str | Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


PICKSCORE = Metric("PickScore", load_pickscore, form=".3f", fetches=True, files=PICKSCORE_FILES)
HPSV2 = Metric("HPSv2.1", load_hpsv2, fetches=True, files=HPS_FILES)
IMAGEREWARD = Metric("ImageReward", load_imagereward, has_zero=False, form=".3f", fetches=True, files=REWARD_FILES)
CLIPIQA_PUBLISHED = Metric("CLIP-IQA as published", load_clipiqa_published, fetches=True, files=PUBLISHED_FILES)
