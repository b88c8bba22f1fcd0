"""What the adapters of the image families say, held against the real classes. No engine is at work here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from families.base import Family, family_pipe, generate, random_embeddings
from families.image import CHANNELS, FAMILIES, TEXT_WIDTH, WIDTH, flux2_transformer
from torch import Tensor, nn

import h2cache
from h2cache import H2CacheConfig
from h2cache.adapters.base import Adapter, BlockModules, ModelCall, Role
from h2cache.adapters.block_call import BlockCall, parameter_names
from h2cache.adapters.chroma import ChromaAdapter
from h2cache.adapters.dit import DiTAdapter
from h2cache.adapters.flux2 import Flux2Adapter
from h2cache.adapters.hunyuan_image import HunyuanImageAdapter
from h2cache.adapters.lumina2 import Lumina2Adapter
from h2cache.adapters.pixart import PixArtAdapter
from h2cache.adapters.qwen_image import QwenImageAdapter
from h2cache.adapters.sana import SanaAdapter
from h2cache.adapters.sd3 import SD3Adapter
from h2cache.adapters.z_image import ZImageAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    "flux2": Flux2Adapter,
    "chroma": ChromaAdapter,
    "qwen-image": QwenImageAdapter,
    "qwen-image-edit": QwenImageAdapter,
    "hunyuan-image": HunyuanImageAdapter,
    "sd3": SD3Adapter,
    "z-image": ZImageAdapter,
    "lumina2": Lumina2Adapter,
    "pixart": PixArtAdapter,
    "sana": SanaAdapter,
    "dit": DiTAdapter,
}
WITH_TWO_LISTS = {"flux2", "chroma", "hunyuan-image"}
WITH_RUN_OBJECTS = {"chroma", "qwen-image", "qwen-image-edit"}
KEPT_EMBEDDINGS = {("sd3", False), ("z-image", False), ("z-image", True)}  # the pipeline hands on the caller's own
WITHOUT_IMAGE_MLP = {"z-image", "sana"}
IMAGE_TOKENS = {"qwen-image-edit": 32, "z-image": 32, "lumina2": 21}  # all others 16; Lumina's stream has the text too
CONTROL = {
    "chroma": "controlnet_single_block_samples",
    "qwen-image": "controlnet_block_samples",
    "sd3": "block_controlnet_hidden_states",
    "z-image": "controlnet_block_samples",
    "sana": "controlnet_block_samples",
}
STEPS = 6

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
guided_or_not = pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])


@dataclass
class Seen:
    """One call of a module."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    inside: list["Seen"] = field(default_factory=list)  # of the modules that a block may skip, in their order

    @property
    def given(self) -> Tensor:
        """The tensor that a module inside a block acts on."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


@dataclass
class SeenBlock(Seen):
    """A call of a block, as the adapter has it."""

    call: BlockCall | None = None
    parts: BlockModules = field(default_factory=BlockModules)
    text_tokens: int = 0

    @property
    def arguments(self) -> dict[str, Any]:
        return self.call.bind(self.args, self.kwargs)

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """Those that went in."""
        return self.call.read(self.arguments, self.text_tokens)

    def parsed(self, output: Any) -> tuple[Tensor, ...]:
        return self.call.parse(output, self.text_tokens)


@dataclass
class Recording:
    """One run of a pipeline: the calls of its transformer, and those of the blocks in the first call."""

    models: list[ModelCall] = field(default_factory=list)
    given: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    blocks: list[SeenBlock] = field(default_factory=list)


class Recorder:
    """Records the calls of a transformer while it is entered."""

    def __init__(self, adapter: Adapter, transformer: nn.Module):
        self.adapter, self.transformer, self.seen = adapter, transformer, Recording()

    def __enter__(self) -> Recording:
        self.current: list[SeenBlock] = []
        hooks = self.hooks = [self.transformer.register_forward_pre_hook(self._model_called, with_kwargs=True)]
        for role, blocks in self.adapter.blocks(self.transformer).items():
            for block in blocks:
                call, parts = self.adapter.block_call(role, block), self.adapter.modules(block)
                begins = partial(self._block_begins, call, parts)
                hooks.append(block.register_forward_pre_hook(begins, with_kwargs=True))
                hooks.append(block.register_forward_hook(self._block_ends, with_kwargs=True))
                for part in (*parts.forecast, *parts.upstream_only):
                    hooks.append(part.register_forward_hook(self._part_called, with_kwargs=True))
        return self.seen

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _model_called(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.seen.models.append(self.adapter.model_call(transformer, args, kwargs))
        self.seen.given.append((args, kwargs))

    def _block_begins(self, call: BlockCall, parts: BlockModules, block: nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        text_tokens = self.seen.models[-1].text_tokens
        self.current.append(SeenBlock(block, args, kwargs, call=call, parts=parts, text_tokens=text_tokens))

    def _block_ends(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen = self.current.pop()
        seen.output = output
        if len(self.seen.models) == 1:
            self.seen.blocks.append(seen)

    def _part_called(self, part: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.current[-1].inside.append(Seen(part, args, kwargs, output))


def record(family: Family, guided: bool, seeds: list[int], inputs: dict[str, Any], steps: int) -> Recording:
    pipe = family_pipe(family.name)
    with Recorder(ADAPTERS[family.name](), pipe.transformer) as seen:
        generate(family, pipe, seeds, guided, steps, inputs)
    return seen


@cache
def batch(family: Family) -> Recording:
    """Three samples, two steps, with guidance: a doubled batch where the family has one."""
    return record(family, True, [0, 1, 2], family.inputs([0, 1, 2], True), steps=2)


@cache
def runs(family: Family, guided: bool) -> tuple[Recording, Recording]:
    """Two runs of one sample, from the very same embeddings."""
    inputs = family.inputs([0], guided)
    return tuple(record(family, guided, [0], inputs, STEPS) for _ in range(2))


@cache
def mixed(name: str) -> Recording:
    """Three samples whose prompts have 9, 40 and 12 tokens (Z-Image), or 3, 7 and 5 (Lumina 2)."""
    family = named(name)
    inputs = family.inputs([0, 1, 2], False)
    if name == "z-image":
        lengths = (9, 40, 12)
        inputs["prompt_embeds"] = [random_embeddings([seed], lengths[seed], TEXT_WIDTH)[0] for seed in range(3)]
    else:
        inputs["prompt_attention_mask"] = (torch.arange(7) < torch.tensor([[3], [7], [5]])).long()
    return record(family, False, [0, 1, 2], inputs, steps=2)


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def recordings(family: Family) -> list[Recording]:
    """Of a batch, also with prompts of different lengths where the family pads them inside."""
    return [batch(family), *([mixed(family.name)] if family.name in {"z-image", "lumina2"} else [])]


def blocks_of(family: Family) -> list[SeenBlock]:
    return [seen for recording in recordings(family) for seen in recording.blocks]


def tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(part for part in output if part is not None)


def equal(these: Any, those: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(these), tensors(those), strict=True))


def same_objects(these: tuple[object, ...], those: tuple[object, ...]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def by_branch(family: Family, seen: Recording, guided: bool) -> list[list[ModelCall]]:
    """The calls of each branch of guidance."""
    branches = (family.guided_calls if guided else 0) or 1
    return [seen.models[branch::branches] for branch in range(branches)]


# Blocks


@every_family
def test_the_adapter_knows_the_transformer(family):
    assert ADAPTERS[family.name]().supports(family_pipe(family.name).transformer)


@every_family
def test_no_other_adapter_knows_the_transformer(family):
    others = set(ADAPTERS.values()) - {ADAPTERS[family.name]}
    assert not any(other().supports(family_pipe(family.name).transformer) for other in others)


@every_family
def test_the_block_lists_are_the_blocks_that_the_model_calls_in_their_order(family):
    lists = ADAPTERS[family.name]().blocks(family_pipe(family.name).transformer)
    assert [seen.module for seen in batch(family).blocks] == [block for blocks in lists.values() for block in blocks]


@every_family
def test_two_lists_are_structure_and_detail_and_one_is_all(family):
    roles = list(ADAPTERS[family.name]().blocks(family_pipe(family.name).transformer))
    assert roles == ([Role.STRUCTURE, Role.DETAIL] if family.name in WITH_TWO_LISTS else [Role.ALL])


@every_family
def test_a_block_called_by_name_does_what_it_does_called_as_it_was(family):
    for seen in blocks_of(family):
        assert equal(seen.module(**seen.arguments), seen.output)


@every_family
def test_the_first_stream_are_the_image_tokens(family):
    for seen in batch(family).blocks:
        assert seen.streams[0].shape[1:] == (IMAGE_TOKENS.get(family.name, 16), WIDTH)


@every_family
def test_the_streams_that_a_block_returns_are_those_that_the_next_one_takes(family):
    for recording in recordings(family):
        for before, after in pairwise(recording.blocks):
            assert equal(before.parsed(before.output), after.streams)


@every_family
def test_streams_put_back_together_are_what_the_block_returned(family):
    for seen in blocks_of(family):
        result = seen.call.result(seen.parsed(seen.output))
        assert type(result) is type(seen.output)
        assert equal(result, seen.output)


@every_family
def test_the_streams_of_the_input_that_a_block_returns_are_as_many_as_it_returns(family):
    for seen in blocks_of(family):
        returned = seen.call.returned(seen.streams)
        assert [stream.shape for stream in returned] == [stream.shape for stream in seen.parsed(seen.output)]


@every_family
def test_a_skipped_block_returns_its_input_as_the_block_would(family):
    for seen in blocks_of(family):
        unchanged = seen.call.unchanged(seen.arguments)
        assert type(unchanged) is type(seen.output)
        assert [part is None for part in unchanged] == [part is None for part in seen.output]
        assert equal(seen.parsed(unchanged), seen.call.returned(seen.streams))


@every_family
def test_a_block_on_some_samples_gives_these_what_it_gives_them_among_all(family):
    rows = torch.tensor([0, 2])
    for seen in blocks_of(family):
        streams = seen.parsed(seen.output)
        some = seen.parsed(seen.module(**seen.call.select(seen.arguments, rows, streams[0].shape[0])))
        for few, all_of_them in zip(some, streams, strict=True):
            torch.testing.assert_close(few, all_of_them[rows], rtol=1e-4, atol=1e-5)


@every_family
def test_each_argument_that_differs_between_samples_is_named_per_sample(family):
    for seen in blocks_of(family):
        samples = seen.streams[0].shape[0]
        chosen = seen.call.select(seen.arguments, torch.tensor([1]), samples)
        for name, value in seen.arguments.items():
            for given, kept in zip(leaves(value), leaves(chosen[name]), strict=True):
                if given.shape[0] % samples == 0:
                    assert kept.shape[0] == given.shape[0] // samples, name


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else []


# The probe of TeaCache


@every_family
def test_the_modulated_input_is_what_the_first_attention_takes(family):
    for recording in recordings(family):
        first = recording.blocks[0]
        attention = next(seen for seen in first.inside if seen.module in first.parts.forecast)
        modulated = ADAPTERS[family.name]().modulated(first.module, first.arguments)
        assert modulated.shape == first.arguments.get("hidden_states", first.arguments.get("x")).shape
        torch.testing.assert_close(modulated, attention.given, rtol=0, atol=0)


@every_family
def test_the_modulated_input_of_one_sample_is_that_of_the_sample_alone(family):
    first = batch(family).blocks[0]
    adapter, arguments = ADAPTERS[family.name](), first.arguments
    alone = first.call.select(arguments, slice(1, 2), first.streams[0].shape[0])
    together = adapter.modulated(first.module, arguments)[1:2]
    torch.testing.assert_close(adapter.modulated(first.module, alone), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["z-image", "lumina2"])
def test_the_padding_of_a_batch_adds_nothing_to_the_modulated_input(name):
    first = mixed(name).blocks[0]
    mask = first.arguments["attn_mask" if name == "z-image" else "attention_mask"]
    modulated = ADAPTERS[name]().modulated(first.module, first.arguments)
    assert not mask.all() and not modulated[~mask].any() and modulated[mask].any(dim=-1).all()


# Modules inside blocks


@every_family
def test_the_modules_are_children_of_their_block_and_each_is_called_once(family):
    for seen in blocks_of(family):
        parts = (*seen.parts.forecast, *seen.parts.upstream_only)
        assert sorted(map(id, parts)) == sorted(id(inside.module) for inside in seen.inside)
        assert all(part in seen.module.children() for part in parts)


@every_family
def test_what_is_forecast_are_tensors_of_samples(family):
    for seen in blocks_of(family):
        for inside in seen.inside:
            assert isinstance(inside.output, Tensor | tuple)
            assert all(part.shape[0] == seen.streams[0].shape[0] for part in tensors(inside.output))


@every_family
def test_what_is_forecast_are_tokens_as_wide_as_the_streams(family):
    for seen in blocks_of(family):
        for inside in seen.inside:
            convolution = family.name == "sana" and inside.module is seen.module.ff  # (B, D, height, width)
            if inside.module in seen.parts.forecast and not convolution:
                assert all(part.ndim == 3 and part.shape[2] == WIDTH for part in tensors(inside.output))


@every_family
def test_an_mlp_takes_the_tokens_of_its_stream_each_alone(family):
    for seen in blocks_of(family):
        for mlp, tokens in zip((seen.parts.image_mlp, seen.parts.text_mlp), (*seen.streams, None), strict=False):
            if mlp is None:
                continue
            (inside,) = [inside for inside in seen.inside if inside.module is mlp]
            assert inside.given.shape == tokens.shape
            torch.testing.assert_close(mlp(inside.given[:, 3:4]), inside.output[:, 3:4], rtol=1e-5, atol=1e-5)


@every_family
def test_an_mlp_is_among_what_is_forecast(family):
    for seen in blocks_of(family):
        mlps = {seen.parts.image_mlp, seen.parts.text_mlp} - {None}
        assert mlps <= set(seen.parts.forecast)


def test_only_z_image_and_sana_have_no_mlp_of_their_own_for_the_image():
    without = {
        family.name for family in FAMILIES if not any(seen.parts.image_mlp is not None for seen in batch(family).blocks)
    }
    assert without == WITHOUT_IMAGE_MLP


@every_family
def test_a_block_whose_modules_are_answered_for_does_without_them(family, monkeypatch):
    for seen in blocks_of(family):
        with monkeypatch.context() as patch:
            answer_for_modules(seen, patch)
            output = seen.module(**seen.arguments)
        assert equal(output, seen.output)


@every_family
def test_a_block_whose_modules_are_answered_for_runs_no_layer_on_tokens(family, monkeypatch):
    for seen in blocks_of(family):
        ran, answered = [], [inside.module for inside in seen.inside]
        with monkeypatch.context() as patch:
            answer_for_modules(seen, patch)
            for layer in seen.module.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d) and layer not in answered:
                    patch.setattr(layer, "forward", partial(noted, ran, layer.forward))
            seen.module(**seen.arguments)
        assert all(given.ndim == 2 for given in ran)  # of the timestep


def answer_for_modules(seen: SeenBlock, patch: pytest.MonkeyPatch) -> None:
    """Let the modules that can be skipped return what they returned, and those that only feed others nothing."""
    for inside in seen.inside:
        answer = inside.output
        if inside.module in seen.parts.upstream_only:
            empty = tuple(part[..., :0] for part in tensors(answer))
            answer = empty[0] if isinstance(answer, Tensor) else empty
        patch.setattr(inside.module, "forward", lambda *args, answer=answer, **kwargs: answer)


def noted(ran: list[Tensor], forward: Callable, given: Tensor) -> Tensor:
    ran.append(given)
    return forward(given)


# Calls of the model


@every_family
def test_the_batch_is_counted_with_the_doubling_of_guidance(family):
    assert {call.batch for call in batch(family).models} == {6 if family.guided_calls == 1 else 3}


@every_family
@guided_or_not
def test_the_transformer_is_called_as_often_as_the_family_says(family, guided):
    first, _ = runs(family, guided)
    assert len(first.models) == STEPS * ((family.guided_calls if guided else 0) or 1)


@every_family
@guided_or_not
def test_timesteps_fall_along_a_run_by_thousandths(family, guided):
    first, _ = runs(family, guided)
    scale = ADAPTERS[family.name]().timestep_scale
    for calls in by_branch(family, first, guided):
        timesteps = [float(call.timestep.amax()) * scale for call in calls]
        assert timesteps == sorted(timesteps, reverse=True) and len(set(timesteps)) == len(timesteps)
        assert timesteps[-1] >= 0 and 800 < timesteps[0] <= 1000


@every_family
def test_there_is_one_timestep_a_sample(family):
    for call in batch(family).models:
        assert call.timestep.shape == (call.batch,)


@every_family
@guided_or_not
def test_what_names_a_run_stays_the_same_object_along_it(family, guided):
    for seen in runs(family, guided):
        assert all(same_objects(call.run, seen.models[0].run) for call in seen.models)
        assert bool(seen.models[0].run) is (family.name in WITH_RUN_OBJECTS)


@every_family
@guided_or_not
def test_what_names_a_run_is_another_object_in_the_next_run_of_the_same_embeddings(family, guided):
    first, second = (seen.models[0].run for seen in runs(family, guided))
    assert all(a is not b for a, b in zip(first, second, strict=True))


@every_family
@guided_or_not
def test_the_embeddings_stay_the_same_objects_along_a_run(family, guided):
    for calls in by_branch(family, runs(family, guided)[0], guided):
        assert calls[0].branch
        assert all(same_objects(call.branch, calls[0].branch) for call in calls)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name not in WITH_RUN_OBJECTS], ids=lambda family: family.name
)
@guided_or_not
def test_without_objects_of_its_own_a_run_has_embeddings_of_its_own_or_those_of_the_caller(family, guided):
    first, second = (seen.models[0].branch for seen in runs(family, guided))
    if (family.name, guided) in KEPT_EMBEDDINGS:  # the timesteps alone tell the runs apart
        assert same_objects(first, second)
    else:
        assert all(a is not b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.guided_calls == 2], ids=lambda family: family.name)
def test_the_two_branches_of_guidance_have_other_embeddings_and_one_input(family):
    for cond, uncond in zip(*by_branch(family, runs(family, True)[0], True), strict=True):
        assert all(a is not b for a, b in zip(cond.branch, uncond.branch, strict=True))
        assert cond.hidden_states is uncond.hidden_states


@every_family
def test_a_call_by_place_is_read_as_a_call_by_name(family):
    seen, transformer = batch(family), family_pipe(family.name).transformer
    names, (args, kwargs) = parameter_names(transformer), seen.given[0]
    by_name = dict(zip(names, args, strict=False)) | kwargs
    last = max(index for index, name in enumerate(names) if name in by_name)
    by_place = ADAPTERS[family.name]().model_call(transformer, tuple(map(by_name.get, names[: last + 1])), {})
    assert same_objects(by_place.branch, seen.models[0].branch)
    assert same_objects(by_place.run, seen.models[0].run)
    assert by_place.hidden_states is seen.models[0].hidden_states
    assert by_place.text_tokens == seen.models[0].text_tokens


@pytest.mark.parametrize("name", CONTROL)
def test_controlnet_adds_between_blocks(name):
    transformer, seen = family_pipe(name).transformer, batch(named(name))
    args, kwargs = seen.given[0]
    assert not seen.models[0].adds_between_blocks
    assert ADAPTERS[name]().model_call(transformer, args, kwargs | {CONTROL[name]: [object()]}).adds_between_blocks


@pytest.mark.parametrize("name", CONTROL)
def test_controlnet_samples_count_once_hit_or_miss(name):
    """Two calls a moment apart, with samples as large as the features: the second skips and returns nearly the same."""
    transformer, seen = family_pipe(name).transformer, batch(named(name))
    names, (args, kwargs) = parameter_names(transformer), seen.given[0]
    given = dict(zip(names, args, strict=False)) | kwargs | {"return_dict": False}
    features = seen.blocks[0].arguments["x"] if name == "z-image" else seen.blocks[0].streams[0]
    sample = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)) * features.std()
    samples = {CONTROL[name]: {0: sample, 1: sample} if name == "z-image" else [sample]}
    time = "t" if "t" in given else "timestep"
    later = {time: given[time] + 1e-5 if name == "z-image" else given[time] * (1 - 1e-5)}  # Z-Image's rises from 0

    def call(**more: Any) -> Tensor:
        with torch.no_grad():
            output = transformer(**given | more)[0]
        return torch.stack(output) if isinstance(output, list) else output

    plain, controlled = call(), call(**samples)
    with h2cache.apply(transformer, H2CacheConfig(tau1=-1.0, tau2=-1.0)):
        assert torch.equal(call(**samples), controlled)
    with h2cache.apply(transformer, H2CacheConfig(tau1=9.0, tau2=9.0)) as handle:
        assert torch.equal(call(**samples), controlled)
        torch.testing.assert_close(call(**samples | later), controlled, rtol=1e-2, atol=1e-2)
    assert any(row.decision.skips for row in handle.trace)
    assert not torch.allclose(plain, controlled, rtol=0.1, atol=0.1)


# FLUX.2


@cache
def flux2_with_reference_tokens() -> tuple[Recording, Recording]:
    """The first step of klein's `kv_cache`, with 8 tokens of a reference image before 16 others, and the second."""
    transformer = flux2_transformer(guidance_embeds=False)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    tokens, text = random_embeddings(range(3), 24, 4 * CHANNELS), random_embeddings(range(3), 7, TEXT_WIDTH, salt=1)
    places = torch.zeros(24, 4)
    common = {"encoder_hidden_states": text, "txt_ids": torch.zeros(7, 4)}
    with torch.no_grad():
        with Recorder(Flux2Adapter(), transformer) as first:
            extracted = transformer(
                tokens,
                timestep=torch.full((3,), 1.0),
                img_ids=places,
                kv_cache_mode="extract",
                num_ref_tokens=8,
                **common,
            )
        with Recorder(Flux2Adapter(), transformer) as second:
            transformer(
                tokens[:, 8:],
                timestep=torch.full((3,), 0.8),
                img_ids=places[8:],
                kv_cache_mode="cached",
                kv_cache=extracted.kv_cache,
                **common,
            )
    return first, second


def test_flux2_reference_tokens_have_a_modulation_of_their_own():
    first = flux2_with_reference_tokens()[0].blocks[0]
    assert first.arguments["temb_mod_img"].shape == (3, 24, 6 * WIDTH)
    modulated = Flux2Adapter().modulated(first.module, first.arguments)
    torch.testing.assert_close(modulated, first.inside[0].given, rtol=0, atol=0)


def test_flux2_blocks_on_some_samples_take_these_samples_of_the_kv_cache():
    rows = torch.tensor([0, 2])
    for seen in flux2_with_reference_tokens()[1].blocks:
        assert seen.arguments["joint_attention_kwargs"]["kv_cache"].k_ref.shape[0] == 3
        some = seen.parsed(seen.module(**seen.call.select(seen.arguments, rows, 3)))
        for few, all_of_them in zip(some, seen.parsed(seen.output), strict=True):
            torch.testing.assert_close(few, all_of_them[rows], rtol=1e-4, atol=1e-5)


def test_flux2_selecting_samples_leaves_the_kv_cache_as_it_is():
    seen = flux2_with_reference_tokens()[1].blocks[0]
    seen.call.select(seen.arguments, torch.tensor([0]), 3)
    assert seen.arguments["joint_attention_kwargs"]["kv_cache"].k_ref.shape[0] == 3


# Chroma


def test_chroma_has_a_rotary_table_of_the_position_ids():
    transformer = family_pipe("chroma").transformer
    assert ChromaAdapter().position_modules(transformer) == [transformer.pos_embed]


def test_chroma_hands_the_same_position_ids_to_every_call_of_a_branch():
    family = named("chroma")
    for calls in by_branch(family, runs(family, True)[0], True):
        assert all(same_objects(call.position_ids, calls[0].position_ids) for call in calls)


def test_a_module_in_the_place_of_chromas_rotary_table_is_not_taken_for_it():
    class Stranger:
        pos_embed = nn.Identity()

    assert ChromaAdapter().position_modules(Stranger()) == []


# Qwen-Image


def test_qwen_image_edit_modulates_given_tokens_by_timestep_zero():
    first = batch(named("qwen-image-edit")).blocks[0]
    arguments = first.arguments
    assert arguments["temb"].shape == (6, WIDTH) and arguments["modulate_index"].shape == (3, 32)
    later = torch.cat([arguments["temb"][:3] + 1, arguments["temb"][3:]])
    modulated = QwenImageAdapter().modulated(first.module, arguments)
    modulated_later = QwenImageAdapter().modulated(first.module, arguments | {"temb": later})
    assert not torch.equal(modulated[:, :16], modulated_later[:, :16])
    assert torch.equal(modulated[:, 16:], modulated_later[:, 16:])


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_nunchakus_subclasses_are_known(name):
    kind = type(family_pipe(name).transformer)
    quantized = type(f"Nunchaku{kind.__name__}", (kind,), {"__module__": "nunchaku.models.transformers"})
    assert ADAPTERS[name]().supports(quantized.__new__(quantized))


def test_nunchakus_qwen_image_blocks_interleave_the_parameters_of_the_modulation():
    first = batch(named("qwen-image")).blocks[0]

    class Quantized(nn.Module):
        """As nunchaku's block: the six parameters of a channel are neighbours, and its scale has the one in it."""

        scale_shift = 0
        img_norm1 = first.module.img_norm1

        def img_mod(self, temb: Tensor) -> Tensor:
            shift, scale, *others = first.module.img_mod(temb).chunk(6, dim=-1)
            return torch.stack([shift, 1 + scale, *others], dim=-1).flatten(1)

        def _modulate(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
            shift, scale, gate = parameters.unsqueeze(1).chunk(3, dim=-1)
            return x * scale + shift, gate

    expected = QwenImageAdapter().modulated(first.module, first.arguments)
    torch.testing.assert_close(QwenImageAdapter().modulated(Quantized(), first.arguments), expected)


def test_nunchakus_qwen_image_with_offload_is_refused():
    class Offloaded(nn.Module):
        offload = True

    with pytest.raises(ValueError, match="set_offload"):
        QwenImageAdapter().blocks(Offloaded())


# Stable Diffusion 3


def test_the_last_block_of_sd3_returns_no_text():
    *others, last = (seen.output[0] for seen in batch(named("sd3")).blocks)
    assert last is None and all(text is not None for text in others)


def test_the_first_blocks_of_sd3_have_two_attentions_and_the_last_one_mlp():
    assert [len(seen.parts.forecast) for seen in batch(named("sd3")).blocks] == [4, 4, 3, 2]


def test_sd3_with_blocks_left_out_is_refused():
    transformer, (args, kwargs) = family_pipe("sd3").transformer, batch(named("sd3")).given[0]
    with pytest.raises(ValueError, match="skip_guidance_layers"):
        SD3Adapter().model_call(transformer, args, kwargs | {"skip_layers": [1]})


# Z-Image and Lumina 2


def test_z_image_has_the_image_before_the_text_of_the_longest_prompt():
    recording = mixed("z-image")
    assert recording.models[0].text_tokens == 64
    assert [stream.shape[1] for stream in recording.blocks[0].streams] == [32, 64]


def test_z_image_hands_new_lists_of_the_same_embeddings_to_every_call():
    first, _ = runs(named("z-image"), True)
    prompts = [args[2] for args, _ in first.given]
    assert prompts[0] is not prompts[1] and same_objects(tuple(prompts[0]), tuple(prompts[1]))


@pytest.mark.parametrize("name, argument", [("z-image", 1), ("lumina2", "timestep")])
def test_the_timestep_of_the_model_itself_rises(name, argument):
    calls = runs(named(name), False)[0].given
    timesteps = [float(args[argument] if name == "z-image" else kwargs[argument]) for args, kwargs in calls]
    assert timesteps == sorted(timesteps)


@pytest.mark.parametrize("name", ["z-image", "lumina2"])
def test_refiners_are_no_blocks_of_a_stage(name):
    transformer = family_pipe(name).transformer
    lists = ADAPTERS[name]().blocks(transformer).values()
    assert [block for blocks in lists for block in blocks] == list(transformer.layers)


# Sana


def test_sana_names_its_run_where_the_pipeline_casts_the_embeddings_at_every_step():
    family = named("sana")
    inputs = family.inputs([0], False)
    inputs["prompt_embeds"] = inputs["prompt_embeds"].double()
    seen = record(family, False, [0], inputs, steps=2)
    (_, first), (_, second) = seen.given
    assert first["encoder_hidden_states"] is not second["encoder_hidden_states"]
    assert same_objects(seen.models[0].branch, seen.models[1].branch)


def test_sana_without_a_mask_is_named_by_its_embeddings():
    (args, kwargs), transformer = batch(named("sana")).given[0], family_pipe("sana").transformer
    call = SanaAdapter().model_call(transformer, args, kwargs | {"encoder_attention_mask": None})
    assert same_objects(call.branch, (kwargs["encoder_hidden_states"],))


# Classes


@every_family
def test_a_class_of_that_name_from_elsewhere_is_not_known(family):
    adapter = ADAPTERS[family.name]()
    stranger = type(adapter.classes[0], (), {"__module__": "elsewhere"})()
    assert not adapter.supports(stranger)
