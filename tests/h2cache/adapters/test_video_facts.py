"""What the adapters of the video families say, held against the real classes. No engine is at work here."""

from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from families.base import family_pipe, generate
from families.video import FAMILIES
from torch import Tensor, nn

from h2cache.adapters.base import Adapter, BlockModules, ModelCall, Role
from h2cache.adapters.block_call import BlockCall, parameter_names
from h2cache.adapters.cogvideox import CogVideoXAdapter
from h2cache.adapters.hunyuan_video import HunyuanVideoAdapter
from h2cache.adapters.hunyuan_video15 import HunyuanVideo15Adapter
from h2cache.adapters.ltx import LTXAdapter
from h2cache.adapters.wan import WanAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    "hunyuan-video": HunyuanVideoAdapter,
    "hunyuan-video-i2v": HunyuanVideoAdapter,
    "hunyuan-video-1.5": HunyuanVideo15Adapter,
    "cogvideox": CogVideoXAdapter,
    "cogvideox-2b": CogVideoXAdapter,
    "wan": WanAdapter,
    "wan-i2v": WanAdapter,
    "wan-a14b": WanAdapter,
    "wan-ti2v": WanAdapter,
    "wan-ti2v-i2v": WanAdapter,
    "ltx": LTXAdapter,
}
WITH_RUN_OBJECTS = {"hunyuan-video", "hunyuan-video-1.5", "cogvideox", "ltx"}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@dataclass
class Seen:
    """One call of a module: by keyword where the caller gave keywords."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    inside: list["Seen"] = field(default_factory=list)  # of the modules that a block may skip, in their order


@dataclass
class SeenBlock(Seen):
    """A call of a block, as the adapter has it."""

    call: BlockCall | None = None
    parts: BlockModules = field(default_factory=BlockModules)

    @property
    def arguments(self) -> dict[str, Any]:
        return self.call.bind(self.args, self.kwargs)


@dataclass
class Recording:
    """One run of a pipeline: the calls of its transformers, and those of the blocks in the first step."""

    models: list[ModelCall] = field(default_factory=list)
    transformers: list[nn.Module] = field(default_factory=list)
    given: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    blocks: list[SeenBlock] = field(default_factory=list)
    result: Tensor | None = None


def record(family: Any, guided: bool, seeds: list[int], inputs: dict[str, Any], steps: int) -> Recording:
    pipe, seen, hooks, current = family_pipe(family.name), Recording(), [], []

    def model_called(adapter: Adapter, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.models.append(adapter.model_call(transformer, args, kwargs))
        seen.transformers.append(transformer)
        seen.given.append((args, kwargs))

    def block_begins(call: BlockCall, parts: BlockModules, block: nn.Module, args: tuple, kwargs: dict) -> None:
        current.append(SeenBlock(block, args, kwargs, call=call, parts=parts))

    def block_ends(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        current[-1].output = output
        if len(seen.models) == 1:
            seen.blocks.append(current[-1])
        current.pop()

    def part_called(part: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        current[-1].inside.append(Seen(part, args, kwargs, output))

    for transformer in transformers_of(pipe):
        adapter = ADAPTERS[family.name]()
        hooks.append(transformer.register_forward_pre_hook(partial(model_called, adapter), with_kwargs=True))
        for role, blocks in adapter.blocks(transformer).items():
            for block in blocks:
                call, parts = adapter.block_call(role, block), adapter.modules(block)
                hooks.append(block.register_forward_pre_hook(partial(block_begins, call, parts), with_kwargs=True))
                hooks.append(block.register_forward_hook(block_ends, with_kwargs=True))
                for part in (*parts.forecast, *parts.upstream_only):
                    hooks.append(part.register_forward_hook(part_called, with_kwargs=True))
    try:
        seen.result = generate(family, pipe, seeds, guided, steps, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def transformers_of(pipe: Any) -> list[nn.Module]:
    return [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]


@cache
def batch(family: Any) -> Recording:
    """Three samples, two steps, with guidance: a doubled batch where the family has one."""
    return record(family, True, [0, 1, 2], family.inputs([0, 1, 2], True), steps=2)


@cache
def runs(family: Any, guided: bool) -> tuple[Recording, Recording]:
    """Two runs of one sample, from the very same embeddings."""
    inputs = family.inputs([0], guided)
    return tuple(record(family, guided, [0], inputs, family.steps) for _ in range(2))


def tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def same_tensors(these: tuple[Tensor, ...], those: tuple[Tensor, ...]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def by_branch(family: Any, seen: Recording, transformer: nn.Module, guided: bool) -> list[list[ModelCall]]:
    """The calls of a transformer, those of each branch of guidance apart."""
    calls = [call for call, module in zip(seen.models, seen.transformers, strict=True) if module is transformer]
    branches = family.guided_calls if guided else 1
    return [calls[branch::branches] for branch in range(branches)]


# Blocks


@every_family
def test_the_adapter_knows_the_transformer(family):
    assert all(
        ADAPTERS[family.name]().supports(transformer) for transformer in transformers_of(family_pipe(family.name))
    )


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
    assert roles == ([Role.STRUCTURE, Role.DETAIL] if ADAPTERS[family.name] is HunyuanVideoAdapter else [Role.ALL])


@every_family
def test_a_block_called_by_name_does_what_it_does_called_by_place(family):
    for seen in batch(family).blocks:
        output = seen.module(**seen.arguments)
        assert all(torch.equal(a, b) for a, b in zip(tensors(output), tensors(seen.output), strict=True))


@every_family
def test_what_is_read_are_video_tokens_and_then_text_tokens_of_one_width(family):
    for seen in batch(family).blocks:
        streams = seen.call.read(seen.arguments, 0)
        assert streams[0].shape[1] == 24
        assert len({stream.shape[::2] for stream in streams}) == 1


@every_family
def test_the_streams_that_a_block_returns_are_those_that_the_next_one_takes(family):
    blocks = batch(family).blocks
    for before, after in pairwise(blocks):
        assert same_tensors(before.call.parse(before.output, 0), after.call.read(after.arguments, 0))


@every_family
def test_streams_put_back_together_are_what_the_block_returned(family):
    for seen in batch(family).blocks:
        result = seen.call.result(seen.call.parse(seen.output, 0))
        assert type(result) is type(seen.output)
        assert same_tensors(tensors(result), tensors(seen.output))


@every_family
def test_a_skipped_block_returns_its_input_as_the_block_would(family):
    for seen in batch(family).blocks:
        unchanged = seen.call.unchanged(seen.arguments)
        assert type(unchanged) is type(seen.output)
        assert [a.shape for a in tensors(unchanged)] == [b.shape for b in tensors(seen.output)]
        assert same_tensors(seen.call.parse(unchanged, 0), seen.call.read(seen.arguments, 0))


@every_family
def test_a_block_on_some_samples_gives_these_what_it_gives_them_among_all(family):
    rows = torch.tensor([0, 2])
    for seen in batch(family).blocks:
        streams = seen.call.parse(seen.output, 0)
        some = seen.call.parse(seen.module(**seen.call.select(seen.arguments, rows, streams[0].shape[0])), 0)
        for few, all_of_them in zip(some, streams, strict=True):
            torch.testing.assert_close(few, all_of_them[rows], rtol=1e-4, atol=1e-5)


@every_family
def test_each_argument_that_differs_between_samples_is_named_per_sample(family):
    for seen in batch(family).blocks:
        arguments, rows = seen.arguments, torch.tensor([1])
        batch_size = seen.call.read(arguments, 0)[0].shape[0]
        chosen = seen.call.select(arguments, rows, batch_size)
        for name, value in arguments.items():
            for given, kept in zip(leaves(value), leaves(chosen[name]), strict=True):
                if given.shape[0] == batch_size:
                    assert kept.shape[0] == 1, name


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else []


# The probe of TeaCache


@every_family
def test_the_modulated_input_is_what_the_first_attention_takes(family):
    first = batch(family).blocks[0]
    attention = next(seen for seen in first.inside if seen.module in first.parts.forecast)
    given = attention.args[0] if attention.args else attention.kwargs["hidden_states"]
    modulated = ADAPTERS[family.name]().modulated(first.module, first.arguments)
    assert modulated.shape == first.call.read(first.arguments, 0)[0].shape
    torch.testing.assert_close(modulated, given, rtol=0, atol=0)


@every_family
def test_the_modulated_input_of_one_sample_is_that_of_the_sample_alone(family):
    first = batch(family).blocks[0]
    adapter, arguments = ADAPTERS[family.name](), first.arguments
    alone = first.call.select(arguments, torch.tensor([1]), arguments["hidden_states"].shape[0])
    torch.testing.assert_close(
        adapter.modulated(first.module, alone), adapter.modulated(first.module, arguments)[1:2], rtol=1e-5, atol=1e-5
    )


# Modules inside blocks


@every_family
def test_the_modules_are_children_of_their_block_and_each_is_called_once(family):
    for seen in batch(family).blocks:
        parts = (*seen.parts.forecast, *seen.parts.upstream_only)
        assert sorted(map(id, parts)) == sorted(id(inside.module) for inside in seen.inside)
        assert all(part in seen.module.children() for part in parts)


@every_family
def test_what_is_forecast_are_tensors_of_tokens_as_wide_as_the_streams(family):
    for seen in batch(family).blocks:
        width = seen.call.read(seen.arguments, 0)[0].shape[::2]
        for inside in seen.inside:
            if inside.module in seen.parts.forecast:
                assert all(part.shape[::2] == width for part in tensors(inside.output))


@every_family
def test_an_mlp_takes_the_tokens_of_its_stream_each_alone(family):
    for seen in batch(family).blocks:
        streams = seen.call.read(seen.arguments, 0)
        for mlp, tokens in zip((seen.parts.image_mlp, seen.parts.text_mlp), (*streams, None), strict=False):
            if mlp is None:
                continue
            (inside,) = [inside for inside in seen.inside if inside.module is mlp]
            given = inside.args[0] if inside.args else inside.kwargs["hidden_states"]
            assert given.shape == tokens.shape
            torch.testing.assert_close(mlp(given[:, 3:4]), inside.output[:, 3:4], rtol=1e-5, atol=1e-5)


@every_family
def test_a_block_whose_modules_are_answered_for_does_without_them(family, monkeypatch):
    for seen in batch(family).blocks:
        with monkeypatch.context() as patch:
            for inside in seen.inside:
                answer = inside.output
                if inside.module in seen.parts.upstream_only:
                    empty = tuple(part[..., :0] for part in tensors(answer))
                    answer = empty[0] if isinstance(answer, Tensor) else empty
                patch.setattr(inside.module, "forward", lambda *args, answer=answer, **kwargs: answer)
            output = seen.module(**seen.arguments)
        assert all(torch.equal(a, b) for a, b in zip(tensors(output), tensors(seen.output), strict=True))


def test_only_cogvideox_has_no_mlp_of_its_own_for_the_video():
    without = {
        family.name for family in FAMILIES if not any(seen.parts.image_mlp is not None for seen in batch(family).blocks)
    }
    assert without == {"cogvideox", "cogvideox-2b"}


# Calls of the model


@every_family
def test_the_batch_is_counted_with_the_doubling_of_guidance(family):
    assert {call.batch for call in batch(family).models} == {6 if family.guided_calls == 1 else 3}


@every_family
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
def test_the_transformer_is_called_as_often_as_the_family_says(family, guided):
    first, _ = runs(family, guided)
    assert len(first.models) == family.steps * (family.guided_calls if guided else 1)


@every_family
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
def test_timesteps_fall_along_a_run_by_thousandths(family, guided):
    first, _ = runs(family, guided)
    scale = ADAPTERS[family.name]().timestep_scale
    for transformer in transformers_of(family_pipe(family.name)):
        for calls in by_branch(family, first, transformer, guided):
            timesteps = [float(call.timestep.amax()) * scale for call in calls]
            assert timesteps == sorted(timesteps, reverse=True) and len(set(timesteps)) == len(timesteps)
            assert timesteps[-1] > 0 and timesteps[0] <= 1000


@every_family
def test_there_is_one_timestep_a_sample(family):
    for call in batch(family).models:
        assert call.timestep.shape == (call.batch,)


@every_family
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
def test_what_names_a_run_stays_the_same_object_along_it(family, guided):
    for seen in runs(family, guided):
        for transformer in transformers_of(family_pipe(family.name)):
            calls = [call for branch in by_branch(family, seen, transformer, guided) for call in branch]
            assert all(same_tensors(call.run, calls[0].run) for call in calls)
            assert bool(calls[0].run) is (family.name in WITH_RUN_OBJECTS)


@every_family
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
def test_what_names_a_run_is_another_object_in_the_next_run_of_the_same_embeddings(family, guided):
    first, second = (seen.models[0].run for seen in runs(family, guided))
    assert all(a is not b for a, b in zip(first, second, strict=True))


@every_family
@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
def test_the_embeddings_stay_the_same_objects_along_a_run(family, guided):
    first, _ = runs(family, guided)
    for transformer in transformers_of(family_pipe(family.name)):
        for calls in by_branch(family, first, transformer, guided):
            assert calls[0].branch
            assert all(same_tensors(call.branch, calls[0].branch) for call in calls)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.guided_calls == 2], ids=lambda family: family.name)
def test_the_two_branches_of_guidance_have_other_embeddings_and_one_input(family):
    first, _ = runs(family, True)
    for transformer in transformers_of(family_pipe(family.name)):
        for cond, uncond in zip(*by_branch(family, first, transformer, True), strict=True):
            assert all(a is not b for a, b in zip(cond.branch, uncond.branch, strict=True))
            assert cond.hidden_states is uncond.hidden_states


@every_family
def test_a_call_by_place_is_read_as_a_call_by_name(family):
    seen, adapter = batch(family), ADAPTERS[family.name]()
    transformer, (_, kwargs) = seen.transformers[0], seen.given[0]
    by_place = adapter.model_call(transformer, tuple(map(kwargs.get, parameter_names(transformer))), {})
    assert same_tensors(by_place.branch, seen.models[0].branch)
    assert same_tensors(by_place.run, seen.models[0].run)
    assert by_place.hidden_states is seen.models[0].hidden_states


# Single families


def test_each_transformer_of_the_a14b_pair_is_called_for_a_part_of_the_steps():
    family = next(family for family in FAMILIES if family.name == "wan-a14b")
    pipe, (first, _) = family_pipe("wan-a14b"), runs(family, False)
    assert first.transformers == [pipe.transformer] * 5 + [pipe.transformer_2] * 5


def test_ti2v_with_an_image_gives_the_first_frame_timestep_zero_and_its_tokens_their_own_temb():
    family = next(family for family in FAMILIES if family.name == "wan-ti2v-i2v")
    seen = batch(family)
    _, kwargs = seen.given[0]
    assert kwargs["timestep"].shape == (3, 24)
    assert not kwargs["timestep"][:, :12].any() and kwargs["timestep"][:, 12:].all()
    assert seen.blocks[0].arguments["temb"].shape == (3, 24, 6, 32)


@pytest.mark.parametrize("adapter", [WanAdapter, LTXAdapter])
def test_of_a_timestep_per_token_the_largest_counts(adapter):
    given = {"timestep": torch.tensor([[0.0, 700.0, 700.0], [0.0, 0.0, 500.0]])}
    assert adapter().timestep(given).tolist() == [700.0, 500.0]


def test_hunyuan_video_with_token_replace_modulates_the_first_frame_by_timestep_zero():
    family = next(family for family in FAMILIES if family.name == "hunyuan-video-i2v")
    first = batch(family).blocks[0]
    arguments = first.arguments
    assert arguments["num_tokens"] == 12
    modulated = HunyuanVideoAdapter().modulated(first.module, arguments)
    later = HunyuanVideoAdapter().modulated(first.module, arguments | {"temb": arguments["temb"] + 1})
    assert torch.equal(modulated[:, :12], later[:, :12]) and not torch.equal(modulated[:, 12:], later[:, 12:])


def test_ltx_positions_that_are_given_name_the_run_too():
    coordinates = torch.zeros(1, 3, 24)
    given = {"hidden_states": torch.zeros(1, 24, 4), "timestep": torch.ones(1), "encoder_hidden_states": torch.ones(1)}
    transformer = family_pipe("ltx").transformer
    assert LTXAdapter().model_call(transformer, (), given | {"video_coords": coordinates}).run == (coordinates,)


def test_a_class_of_that_name_from_elsewhere_is_not_known():
    stranger = type("WanTransformer3DModel", (), {"__module__": "elsewhere"})()
    assert not WanAdapter().supports(stranger)
