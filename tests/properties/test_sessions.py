"""Random sessions: whatever happened before on a pipeline, each image equals itself made alone.

A session is drawn from its seed: a family, then images with other seeds, batches, guidance and step counts, runs that
break off, settings that change, caches that are applied anew or removed, two pipelines in two threads.
`H2CACHE_SESSIONS=500` is the thorough run.
"""

import copy
import os
import random
import threading
from dataclasses import dataclass, fields
from functools import cache

import pytest
import torch
from families import FAMILIES, Family, family_named, family_pipe, generate

import h2cache
from h2cache import CacheConfig, H2CacheConfig
from h2cache.adapters import transformers_of
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig

SESSIONS = int(os.environ.get("H2CACHE_SESSIONS", "20"))
IMAGES = 4  # of a session
# Their autoencoder or guider keeps state while it works, so that two threads disturb each other without a cache, too.
UNSAFE = ("hunyuan-image", "hunyuan-video-1.5", "hunyuan-video-i2v", "wan-i2v", "wan-ti2v-i2v")
CONFIGS = (
    H2CacheConfig(tau1=0.3, tau2=0.35),
    H2CacheConfig(tau1=0.6, tau2=0.2, forecast="hermite", order=2, max_consecutive_hits=2),
    BlockCacheConfig(threshold=0.4),
    TeaCacheConfig(threshold=0.5, coefficients=(1.0, 0.0)),
    TaylorSeerConfig(interval=2, first_enhance=2),
    HiCacheConfig(interval=3, first_enhance=2, granularity="stage", sigma="auto"),
    ClusCaConfig(interval=2, first_enhance=2, clusters=3),
)


class BreakOff(Exception):
    """An error in the middle of a run."""


@dataclass(frozen=True)
class Image:
    """What is asked of the pipeline."""

    seeds: tuple[int, ...]
    guided: bool
    steps: int


def make(family: Family, pipe, image: Image, break_off_at: int | None = None) -> torch.Tensor:
    calls = []

    def note(module, args, output):
        calls.append(None)
        if len(calls) == break_off_at:
            raise BreakOff

    hooks = [part.register_forward_hook(note) for part in transformers_of(pipe)]
    try:
        return generate(family, pipe, seeds=image.seeds, guided=image.guided, steps=image.steps)
    finally:
        for hook in hooks:
            hook.remove()


@cache
def alone(name: str, config: CacheConfig | None, image: Image) -> torch.Tensor:
    """The image, made on a pipeline that has made nothing before under this cache."""
    family, pipe = family_named(name), family_pipe(name)
    if config is None:
        return make(family, pipe, image)
    with h2cache.apply(pipe, config):
        return make(family, pipe, image)


def applicable(name: str, config: CacheConfig) -> bool:
    try:
        h2cache.apply(family_pipe(name), config).remove()
    except ValueError:
        return False
    return True


def random_image(family: Family, chance: random.Random) -> Image:
    seeds = tuple(chance.sample(range(4), chance.choice((1, 1, 2))))
    return Image(seeds, bool(family.guided_calls) and chance.random() < 0.5, chance.choice((2, 4, 5)))


def in_a_thread_beside(family: Family, pipe, images: list[Image]) -> list[torch.Tensor]:
    """Each image by a pipeline and a thread of its own, on the same transformers."""
    made: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        own = copy.copy(pipe)
        own.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        made[index] = generate(
            family, own, seeds=images[index].seeds, guided=images[index].guided, steps=images[index].steps
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [made[index] for index in range(len(images))]


@pytest.mark.parametrize("seed", range(SESSIONS))
def test_each_image_of_a_session_equals_itself_made_alone(seed):
    chance = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    configs = [config for config in CONFIGS if applicable(family.name, config)]
    plans = [
        (chance.choice(configs), random_image(family, chance), random_image(family, chance)) for _ in range(IMAGES)
    ]
    expected = [[alone(family.name, config, image) for image in images] for config, *images in plans]
    pipe, handle = family_pipe(family.name), None
    try:
        for (config, first, second), (one, two) in zip(plans, expected, strict=True):
            if handle is not None and type(handle.config) is type(config) and chance.random() < 0.5:
                handle.update(**{field.name: getattr(config, field.name) for field in fields(config)})
            else:
                if handle is not None and chance.random() < 0.5:
                    handle.remove()
                handle = h2cache.apply(pipe, config)
            if chance.random() < 0.4:
                with pytest.raises(BreakOff):
                    make(family, pipe, second, break_off_at=chance.choice((1, 2)))
            if chance.random() < 0.25 and family.name not in UNSAFE:
                assert all(map(torch.equal, in_a_thread_beside(family, pipe, [first, second]), (one, two)))
            else:
                assert torch.equal(make(family, pipe, first), one)
                assert torch.equal(make(family, pipe, second), two)
    finally:
        if handle is not None:
            handle.remove()
    image = plans[0][1]
    assert torch.equal(make(family, pipe, image), alone(family.name, None, image))
