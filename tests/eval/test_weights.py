"""Other weights of a setting: a LoRA that is merged, quantized layers, both; the pipeline's own stay as they are."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from diary import CELLS
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from h2cache.eval.errors import NotInstalled, UserError
from h2cache.eval.generation.backends import own_copy
from h2cache.eval.generation.records import Store
from h2cache.eval.generation.sweep import Painter
from h2cache.eval.models.identity import identity
from h2cache.eval.models.loras import FluxLoraConfig
from h2cache.eval.models.pipelines import ModelConfig, load_pipeline
from h2cache.eval.models.weights import GROUP, Weights

RANK, ALPHA = 2, 6
FIELDS = {  # of a model, but for its folder
    **{"hub_id": None, "dtype": "float32", "device": "cpu", "offload": "none"},
    **{"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 24},
}
TORCHAO = pytest.mark.skipif(not find_spec("torchao"), reason="quantized weights need torchao")


@pytest.fixture(scope="module")
def lora(tiny_pipe_folder, tmp_path_factory) -> str:
    """A file of a random LoRA on the queries and the last layers of MLPs."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_pipe_folder)
    torch.manual_seed(3)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "net.2"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    layers = get_peft_model_state_dict(pipe.transformer)
    metadata = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["to_q", "net.2"]}
    folder = tmp_path_factory.mktemp("lora") / "other"
    FluxPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
    return str(folder / "pytorch_lora_weights.safetensors")


def changed(pipe, weights: Weights):
    copy = own_copy(pipe)
    weights.put_on(copy)
    return copy.transformer


def matrices(transformer) -> dict[str, torch.Tensor]:
    layers = transformer.named_modules()
    return {name: layer.weight for name, layer in layers if isinstance(layer, torch.nn.Linear)}


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_lora_is_merged_into_the_layers_that_it_names(tiny_pipe, lora, strength):
    from safetensors.torch import load_file

    before = matrices(tiny_pipe.transformer)
    after = matrices(changed(tiny_pipe, Weights(lora=lora, lora_strength=strength)))
    layers = {name.removeprefix("transformer."): part for name, part in load_file(lora).items()}
    assert before.keys() == after.keys()
    for name, weight in before.items():
        up, down = layers.get(f"{name}.lora_B.weight"), layers.get(f"{name}.lora_A.weight")
        added = strength * ALPHA / RANK * up @ down if up is not None else 0.0
        torch.testing.assert_close(after[name], weight + added, rtol=1e-5, atol=1e-6)
    assert sum(f"{name}.lora_B.weight" in layers for name in before) == 2 * 2 + 3 + 2  # queries and MLPs of the blocks


def test_a_model_with_a_lora_has_the_same_weights(tiny_pipe, tiny_pipe_folder, lora, tmp_path):
    config = FluxLoraConfig(**FIELDS, path=str(tiny_pipe_folder), lora=lora, lora_strength=0.5)
    expected = matrices(changed(tiny_pipe, Weights(lora=lora, lora_strength=0.5)))
    for name, weight in matrices(load_pipeline(config).transformer).items():
        torch.testing.assert_close(weight, expected[name])
    assert identity(config) != identity(replace(config, lora_strength=1.0))
    (tmp_path / "moved.safetensors").write_bytes(Path(lora).read_bytes())
    assert identity(config) == identity(replace(config, lora=str(tmp_path / "moved.safetensors")))
    with pytest.raises(UserError, match=r"model.lora=absent: there is no such file, seen from .* or give another"):
        replace(config, lora="absent").check()
    (tmp_path / "broken.safetensors").write_text("not weights")
    with pytest.raises(UserError, match=r"broken\.safetensors does not load as a LoRA"):
        replace(config, lora=str(tmp_path / "broken.safetensors")).load()
    for field, value in (("lora", None), ("lora_strength", "much")):
        with pytest.raises(ValueError, match=f"{field}={value!r} is not allowed"):
            replace(config, **{field: value})


@TORCHAO
@pytest.mark.parametrize(("quantized", "largest", "in_groups"), [("int8", 127, 0), ("int4", 7.5, GROUP)])
def test_blocks_are_rounded_to_the_nearest_of_as_many_values(tiny_pipe, quantized, largest, in_groups):
    """Each weight is at most half a step from what it was; a step is the row's or group's largest weight by so much."""
    before = matrices(tiny_pipe.transformer)
    after = matrices(changed(tiny_pipe, Weights(quantized=quantized)))
    for name, weight in before.items():
        if "blocks." not in name:
            assert torch.equal(after[name], weight), name
            continue
        groups = weight.unflatten(1, (-1, in_groups or weight.shape[1]))
        step = groups.abs().amax(2, keepdim=True) / largest
        missed = after[name].dequantize().unflatten(1, (-1, groups.shape[2])) - groups
        assert (missed.abs() <= 0.505 * step + 1e-7).all(), name
        assert missed.abs().max() > 0.25 * step.max(), name  # rounded, and not left alone


@TORCHAO
def test_images_are_drawn_with_them_and_without_them_in_turns(tiny_pipe_folder, lora):
    painter = Painter(ModelConfig(**FIELDS, path=str(tiny_pipe_folder)))
    plain, _, cached = CELLS[:3]
    chosen = [Weights(lora=lora), Weights(quantized="int4"), Weights(lora=lora, quantized="int4")]
    cells = [plain, *(replace(plain, weights=each) for each in chosen), replace(cached, weights=chosen[1]), plain]
    drawn = [painter.draw(cell) for cell in cells]
    images = [np.asarray(each.image, float) for each in drawn]
    assert np.array_equal(images[0], images[-1])
    for first in range(4):
        for second in range(first):
            assert not np.array_equal(images[first], images[second])
    assert drawn[4].computed_fraction < 1 and len({each.multiply_adds for each in drawn[:4]}) == 1


def test_records_tell_them_apart_by_content(tmp_path, lora):
    store, file = Store(tmp_path, {"weights": "tiny"}), tmp_path / "moved.safetensors"
    with open(lora, "rb") as content:
        file.write_bytes(content.read())
    cell = CELLS[0]
    chosen = (None, Weights(lora), Weights(str(file)), Weights(lora, lora_strength=0.5))
    names = [store.fingerprint(replace(cell, weights=each)) for each in chosen]
    assert names[0] == store.fingerprint(cell) and names[0] != names[1] == names[2]
    assert names[3] not in names[:3]
    file.write_bytes(b"another")
    assert store.fingerprint(replace(cell, weights=Weights(str(file)))) != names[1]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "weights must name a lora, quantized, or both"),
        ({"lora": "absent.safetensors"}, "lora=absent.safetensors: there is no such file"),
        ({"quantized": "int3"}, "quantized=int3 is not allowed: choose int8 or int4"),
        ({"quantized": "int8", "lora_strength": 0.5}, "lora_strength=0.5 is not allowed: give a number, and a lora"),
    ],
)
def test_what_there_is_not_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        Weights(**fields)


def test_without_the_library_it_says_which(monkeypatch, lora):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match="quantized needs torchao: pip install torchao"):
        Weights(quantized="int8")
    with pytest.raises(NotInstalled, match="lora needs peft: pip install peft"):
        Weights(lora=lora)
