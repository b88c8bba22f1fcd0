"""The stand-in is as strict as nunchaku's kernels, and its packing must be undone: else it would prove nothing."""
# ruff: noqa: F811 - fixtures

from typing import Any

import pytest
import torch
from loops import denoise
from nunchakus import CLASSES, flux, nunchaku, standin  # noqa: F401
from torch import Tensor


def half(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def core(nunchaku) -> Any:
    return standin(nunchaku, "v1", flux()).front.m


@pytest.fixture
def arguments(nunchaku) -> dict[str, Tensor]:
    """A sound call of a layer."""
    table = torch.randn(1, 256, 8, 1, 2)
    return dict(
        hidden_states=half(2, 5, 32),
        encoder_hidden_states=half(2, 3, 32),
        temb=half(2, 32),
        rotary_emb_img=nunchaku.models.embeddings.pack_rotemb(table),
        rotary_emb_context=nunchaku.models.embeddings.pack_rotemb(table),
    )


def test_packing_is_a_permutation_with_a_way_back(nunchaku):
    embeddings = nunchaku.models.embeddings
    table = torch.arange(512 * 16, dtype=torch.float32).reshape(1, 512, 8, 1, 2)
    packed = embeddings.pack_rotemb(table)
    assert packed.shape == (1, 512, 16)
    assert not torch.equal(packed.flatten(), table.flatten())
    assert torch.equal(packed.flatten().sort().values, table.flatten())
    cosine, sine = embeddings.unpack_rotemb(packed, 300)
    assert torch.equal(sine, table[0, :300, :, 0, 0].repeat_interleave(2, dim=1))
    assert torch.equal(cosine, table[0, :300, :, 0, 1].repeat_interleave(2, dim=1))
    # 16 tokens x 8 numbers a tile: the first thread has tokens 0 and 8, and pair 0 of each.
    assert packed.flatten()[:4].tolist() == [0, 1, 8 * 16, 8 * 16 + 1]


@pytest.mark.parametrize("generation", CLASSES)
def test_a_table_that_is_not_packed_gives_another_image(generation, nunchaku, monkeypatch):
    subject = standin(nunchaku, generation, flux())
    sound = subject.denoise(steps=2)

    def flat(table: Tensor) -> Tensor:
        return table.flatten(2)

    if generation == "v1":
        monkeypatch.setattr(type(subject.front), "pack_rotemb", staticmethod(flat))
    else:
        monkeypatch.setitem(type(subject.transformer).forward.__globals__, "pack_rotemb", flat)
    assert not torch.equal(subject.denoise(steps=2), sound)


def test_a_layer_returns_the_image_first(core, arguments):
    image, text = core.forward_layer(0, **arguments)
    assert image.shape == (2, 5, 32) and text.shape == (2, 3, 32)
    modulated, *rest = core.norm_one_forward(0, arguments["hidden_states"], arguments["temb"])
    assert modulated.shape == (2, 5, 32) and [part.shape for part in rest] == [(2, 32)] * 4


FAULTS = {
    "float32": ("hidden_states", lambda x: x.float(), TypeError, "hidden_states is torch.float32"),
    "not-contiguous": ("encoder_hidden_states", lambda x: x.mT.contiguous().mT, ValueError, "is not contiguous"),
    "another-batch": ("temb", lambda x: x[:1], ValueError, "temb has shape"),
    "rotary-in-half": ("rotary_emb_img", lambda x: x.bfloat16(), ValueError, "float32"),
    "rotary-strided": ("rotary_emb_img", lambda x: x.mT.contiguous().mT, ValueError, "contiguous"),
    "not-padded": ("rotary_emb_context", lambda x: x[:, :16], ValueError, "padded to a multiple of 256"),
    "padded-too-far": ("rotary_emb_img", lambda x: x.repeat(1, 2, 1), ValueError, "padded to a multiple of 256"),
    "rotary-by-sample": ("rotary_emb_img", lambda x: x.repeat(2, 1, 1), ValueError, "padded to a multiple of 256"),
}


@pytest.mark.parametrize(("name", "spoil", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_what_kernels_would_misread_is_refused(name, spoil, error, message, core, arguments):
    core.forward_layer(0, **arguments)
    with pytest.raises(error, match=message):
        core.forward_layer(0, **arguments | {name: spoil(arguments[name])})


def test_samples_come_stacked_and_layers_exist(core, arguments):
    samples = [half(2, 5, 32)]
    core.forward_layer(1, **arguments, controlnet_block_samples=torch.stack(samples))
    with pytest.raises(TypeError, match="stacked"):
        core.forward_layer(1, **arguments, controlnet_block_samples=samples)
    with pytest.raises(IndexError, match="layer 2 of 2"):
        core.forward_layer(2, **arguments)


def test_a_norm_whose_layer_is_offloaded_is_refused(nunchaku, arguments):
    core = standin(nunchaku, "v1", flux(), offload=True).front.m
    core.norm_one_forward(0, arguments["hidden_states"], arguments["temb"])
    with pytest.raises(RuntimeError, match="not on the device"):
        core.norm_one_forward(1, arguments["hidden_states"], arguments["temb"])


def test_v1_is_one_module_of_no_weights(nunchaku):
    """Whatever walks over the model's modules and weights sees none of the core's."""
    model = flux()
    transformer = standin(nunchaku, "v1", model).transformer
    assert len(transformer.transformer_blocks) == 1 and len(transformer.single_transformer_blocks) == 0
    assert not list(transformer.transformer_blocks[0].parameters())
    assert set(transformer.state_dict()) == {name for name in model.state_dict() if "transformer_blocks." not in name}


def test_four_bits_are_fifteen_steps_in_groups_of_64(nunchaku):
    weight = torch.randn(3, 130, generator=torch.Generator().manual_seed(0))
    rounded = nunchaku.models.utils.rounded(weight)
    for row, exact in zip(rounded, weight, strict=True):
        for group, whole in zip(row.split(64), exact.split(64), strict=True):
            step = whole.abs().max() / 7
            assert torch.allclose(group / step, (group / step).round(), atol=1e-4)
            assert (group - whole).abs().max() <= step / 2 + 1e-6
            assert 7 < len(group.unique()) <= 15 or len(whole) < 64


def test_a_lora_on_the_stand_in_is_the_same_as_in_its_weights(nunchaku):
    model = flux()
    subject = standin(nunchaku, "v1", model)
    down, up = half(2, 32), half(32, 2)
    layer = "transformer_blocks.0.attn.to_v"
    subject.transformer.update_lora_params({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
    model.get_submodule(layer).weight.data += up @ down
    assert torch.equal(subject.denoise(steps=2), denoise(model, dtype=model.dtype, steps=2))
