"""What an adapter tells the engine about one family of transformers.

An adapter is a page of facts and copies no forward. Everything has a default, so that the simplest family names its
class and its block list. Facts that are no constants are methods; override what differs.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..policy.probes import ModulatedInput
from ..policy.stages import Stage
from .block_call import ONE_STREAM, BlockCall, BlockInterface, JoinedBlockCall, arguments_by_name, plain


class Role(StrEnum):
    """What a block list is to a method. `ALL` is a lone list, which methods with two stages split in two."""

    STRUCTURE = "structure"
    DETAIL = "detail"
    ALL = "all"


@dataclass(frozen=True)
class BlockList:
    """A list of blocks of the transformer: its attribute, its role, how its blocks are called."""

    attribute: str
    role: Role = Role.ALL
    interface: BlockInterface = field(default=ONE_STREAM)


class ModelCall(NamedTuple):
    """What the engine reads off one call of the model.

    Fields:
        hidden_states: the latents as they are given, of any rank, batch first. The tensor object names the input of
            a step: a pipeline gives the same one to both branches of guidance.
        batch: the number of samples.
        timestep: (B,) or (1,), one number a sample, falling along a run, in the unit of `Adapter.timestep_scale`.
        run: objects that a pipeline makes anew for every run and hands to each of its calls; () where it has none.
        branch: the tensors that tell the branches of guidance apart: the embeddings of the prompt.
        text_tokens: the length of the text stream, for blocks that join it to the image; 0 where none does.
        adds_between_blocks: the model adds to the streams between blocks in this call (ControlNet).
        position_ids: the inputs of the modules in `Adapter.position_modules`.
    """

    hidden_states: Tensor
    batch: int
    timestep: Tensor
    run: tuple[object, ...]
    branch: tuple[Tensor, ...]
    text_tokens: int = 0
    adds_between_blocks: bool = False
    position_ids: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True)
class BlockModules:
    """The modules inside a block that make up what it adds to the streams.

    Fields:
        forecast: their outputs, before the gates, can be forecast (attention: one tensor or several; MLPs: one).
        upstream_only: these only feed a forecast module; while it is skipped they need not run.
        image_mlp, text_mlp: those of `forecast` that act on each token alone.
    """

    forecast: tuple[nn.Module, ...] = ()
    upstream_only: tuple[nn.Module, ...] = ()
    image_mlp: nn.Module | None = None
    text_mlp: nn.Module | None = None


@dataclass(frozen=True)
class BlockLoop:
    """One call of the model, for an adapter that runs the blocks in the place of a module that hides them.

    Fields:
        call: what is known of the call.
        single_stage: one stage takes all blocks and nothing is added between them, so that only its first and last
            are needed.
        once: `once(key, sources, make)` is what `make()` returned when it was first called in this branch of the run, a
            tuple of tensors; it is made again where one of the tensors `sources` is another, or was written to, or
            cannot tell (inference tensors).
    """

    call: ModelCall
    single_stage: bool
    once: Callable[[Hashable, Sequence[Tensor], Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]]


RunBlocks = Callable[[BlockLoop, Callable[..., Any], tuple, dict[str, Any]], Any]


class Adapter:
    """A family of transformers, as facts. Every application of a cache makes an adapter of its own.

    Class attributes:
        family: its name in messages.
        classes: names of the transformer classes that it serves, subclasses included.
        library: the package that these classes come from.
        block_lists: in the order of the network.
        run_arguments: names of the model's arguments that a pipeline makes anew for each run; some may be absent.
        branch_arguments: names of those that hold the embeddings of the prompt; tensors or lists of tensors.
        text_argument: the one whose second dimension is the length of the text, for joined blocks.
        control_arguments: what is added between blocks when one of these is given.
        timestep_scale: from the unit of the model's timestep to 0..1000.
        polynomial_family: whose published TeaCache polynomial serves (`ModulatedInput.fitted_for`); None: nobody's.
    """

    family: str
    classes: tuple[str, ...] = ()
    library: str = "diffusers"
    block_lists: tuple[BlockList, ...] = (BlockList("transformer_blocks"),)
    run_arguments: tuple[str, ...] = ()
    branch_arguments: tuple[str, ...] = ("encoder_hidden_states",)
    text_argument: str | None = None
    control_arguments: tuple[str, ...] = ()
    timestep_scale: float = 1.0
    polynomial_family: str | None = None

    def supports(self, module: object) -> bool:
        """Whether this adapter knows `module`. By name, so that nothing is imported that is not in use."""
        return any(
            kind.__name__ in self.classes and kind.__module__.partition(".")[0] == self.library
            for kind in type(module).__mro__
        )

    def check(self, stages: Sequence[Stage]) -> None:
        """Raise ValueError, saying what to use instead, where this transformer cannot have a method's stages.

        An override calls this one too, which checks what TeaCache needs: a probe and a polynomial of the family.
        """
        for stage in stages:
            if not isinstance(stage.probe, ModulatedInput):
                continue
            if self.modulated is None:
                raise ValueError(
                    f"the adapter of {self.family} does not say what the timestep modulates, which TeaCacheConfig "
                    "compares: use H2CacheConfig or BlockCacheConfig, or give the adapter a method `modulated`"
                )
            if stage.probe.fitted_for not in (None, self.polynomial_family):
                raise ValueError(
                    f"the default coefficients of TeaCacheConfig were fitted for {stage.probe.fitted_for}, not for "
                    f"{self.family}: fit others with `python -m tools.fit_teacache` and pass them as coefficients, or "
                    "use H2CacheConfig or BlockCacheConfig, which need none"
                )

    def blocks(self, transformer: nn.Module) -> dict[Role, list[nn.Module]]:
        """The block lists by role, in the order of the network; the same ones at every call."""
        return {listed.role: list(getattr(transformer, listed.attribute)) for listed in self.block_lists}

    def block_call(self, role: Role, block: nn.Module) -> BlockCall:
        """How `block`, of the list of that role, is called."""
        interface = next(listed.interface for listed in self.block_lists if listed.role is role)
        return (JoinedBlockCall if interface.joined else BlockCall)(block, interface)

    def modules(self, block: nn.Module) -> BlockModules:
        """What can be skipped inside `block`; nothing where the family's modules are not known."""
        return BlockModules()

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """TeaCache's probe: (B, N, D), the image tokens as the timestep modulates them before the first block.

        A family without such a thing sets `modulated = None`, and TeaCache is refused.

        Args:
            block: the first block of the network, not compiled.
            arguments: of its call, by name, for one sample or more.
        """
        return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]

    def timestep(self, given: dict[str, Any]) -> Tensor:
        """(B,) or (1,): the timestep as one number a sample, falling along a run.

        Of a timestep for each token the largest: given tokens, such as those of a first frame, have smaller ones.
        """
        timestep = given["timestep"]
        return timestep.amax(dim=1) if timestep.ndim == 2 else timestep.reshape(-1)

    def latents(self, given: dict[str, Any]) -> tuple[Tensor, int]:
        """The tensor that names the input of the step, and the number of samples."""
        hidden_states = given["hidden_states"]
        return hidden_states, hidden_states.shape[0]

    def model_call(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ModelCall:
        """What a call of the model says about its run."""
        return self.describe(arguments_by_name(transformer, args, kwargs))

    def describe(self, given: dict[str, Any]) -> ModelCall:
        """The same of the arguments of a call, by name."""
        hidden_states, batch = self.latents(given)
        return ModelCall(
            hidden_states=hidden_states,
            batch=batch,
            timestep=self.timestep(given),
            run=tuple([named for name in self.run_arguments if (named := given.get(name)) is not None]),
            branch=tuple(flattened([given.get(name) for name in self.branch_arguments])),
            text_tokens=0 if self.text_argument is None else given[self.text_argument].shape[1],
            adds_between_blocks=any([given.get(name) is not None for name in self.control_arguments]),
            position_ids=self.position_ids(given),
        )

    def position_modules(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Modules that return the same at every step of a run: a function of the position ids and of the constants
        `theta` and `axes_dim` (`runtime/rope_cache.py`)."""
        return ()

    def position_ids(self, given: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """The inputs of `position_modules`."""
        return ()

    def block_loops(self, transformer: nn.Module) -> dict[nn.Module, RunBlocks]:
        """Modules that hide blocks, and what is done in place of their calls: `run(loop, original_forward, args,
        kwargs)` calls the blocks one by one, where `original_forward(*args, **kwargs)` would run them unseen."""
        return {}


def modulated_by_table(block: nn.Module, hidden_states: Tensor, modulation: Tensor) -> Tensor:
    """`Adapter.modulated` of a block that adds a table of its own to a modulation that is made once for all blocks.

    Args:
        hidden_states: (B, N, D).
        modulation: (B, 1 or N, 6, D): shift and scale of the first norm, and four others.
    """
    shift, scale = (block.scale_shift_table + modulation).unbind(dim=2)[:2]
    return block.norm1(hidden_states) * (1 + scale) + shift


def modules_named(
    block: nn.Module,
    *names: str,
    image_mlp: str | None = None,
    text_mlp: str | None = None,
    upstream_only: tuple[str, ...] = (),
) -> BlockModules:
    """The modules of `block` by their names: `names` and the MLPs of one stream can be forecast.

    Those that this block does not have are left out.
    """
    inside = plain(block)._modules
    forecast = [inside.get(name) for name in (*names, image_mlp, text_mlp)]
    return BlockModules(
        forecast=tuple(module for module in forecast if module is not None),
        upstream_only=tuple(inside[name] for name in upstream_only),
        image_mlp=inside.get(image_mlp),
        text_mlp=inside.get(text_mlp),
    )


def double_or_single(block: nn.Module) -> BlockModules:
    """The modules of a block of Flux's kind: a single one projects attention and MLP together."""
    if hasattr(plain(block), "ff_context"):
        return modules_named(block, "attn", image_mlp="ff", text_mlp="ff_context")
    return modules_named(block, "proj_out", upstream_only=("attn", "proj_mlp"))


def flattened(values: Any) -> list[Tensor]:
    """The tensors in nested lists, in order; None is left out."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None:
            found += flattened(value)
    return found


def onload(block: nn.Module) -> None:
    """Have the weights of a block that diffusers' group offloading keeps elsewhere where the block runs.

    Those that a stream prefetches are waited for: till then they look as if they were there.
    """
    registry = vars(plain(block)).get("_diffusers_hook")
    hook = registry.get_hook("group_offloading") if registry is not None else None
    if hook is None:
        return
    group = hook.group
    if any(weight.device == group.offload_device for weight in block.parameters()):
        group.onload_()
    if group.stream is not None:
        group.stream.synchronize()
