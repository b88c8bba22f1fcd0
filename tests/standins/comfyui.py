"""The parts of ComfyUI that the nodes touch, written anew from its public source (Comfy-Org/ComfyUI on GitHub):

- `comfy/samplers.py` at 311c014: `KSAMPLER.sample`, `KSamplerX0Inpaint`, and what `CFGGuider` passes on;
- `comfy/model_sampling.py` at 2fd2083: how `EPS`, `V_PREDICTION`, `CONST`, `COSMOS_RFLOW` and the image-to-image kinds
  scale noise and denoise, and the noise levels of `ModelSamplingFlux`;
- `comfy/model_base.py` at 094c74c: `model_sampling`, which joins one class of each sort, and `_apply_model`;
- `folder_paths.py`: `models_dir`; `nodes.py`: `load_custom_node`, which runs `__init__.py` under a name of its own.

Stricter than ComfyUI: an argument that it would ignore, or a tensor of another dtype or shape, is an AssertionError.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def column(sigma: Tensor, ndim: int) -> Tensor:
    """(B,) as (B, 1, ...); one number as it is."""
    return sigma.view(()) if sigma.nelement() == 1 else sigma.view(-1, *[1] * (ndim - 1))


class EPS:
    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (column(sigma, x.ndim) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * column(sigma, x.ndim)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        sigma = column(sigma, noise.ndim)
        return noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent


class V_PREDICTION(EPS):
    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        sigma = column(sigma, x.ndim)
        return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


class COSMOS_RFLOW(EPS):
    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        sigma = column(sigma / (sigma + 1), x.ndim)
        return x * (1 - sigma) - output * sigma


class CONST:
    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * column(sigma, x.ndim)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        sigma = column(sigma, noise.ndim)
        return sigma * noise + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - column(sigma, latent.ndim))


class IMG_TO_IMG_FLOW(CONST):
    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return output

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return latent_image


class ModelSamplingFlux(torch.nn.Module):
    """Noise levels are timesteps."""

    sigma_min, sigma_max = torch.tensor(1e-4), torch.tensor(1.0)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma


class ModelSamplingDiscrete(torch.nn.Module):
    sigma_min, sigma_max = torch.tensor(0.0292), torch.tensor(14.6146)


def model_sampling(levels: type, kind: type) -> torch.nn.Module:
    """As ComfyUI makes it: a class of both."""
    return type("ModelSampling", (levels, kind), {})()


class Model:
    """A model as ComfyUI holds it: `diffusion_model(x, timestep)` returns its raw output."""

    def __init__(self, diffusion_model: Callable[[Tensor, Tensor], Tensor], sampling: torch.nn.Module):
        self.diffusion_model, self.model_sampling = diffusion_model, sampling

    def apply_model(self, x: Tensor, sigma: Tensor) -> Tensor:
        output = self.diffusion_model(
            self.model_sampling.calculate_input(sigma, x), self.model_sampling.timestep(sigma).float()
        )
        return self.model_sampling.calculate_denoised(sigma, output.float(), x)


class Guider:
    """What samplers call: the model after guidance. Without a second prompt that is the model."""

    def __init__(self, model: Model):
        self.inner_model = model

    def __call__(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int) -> Tensor:
        assert x.dtype == timestep.dtype == torch.float32 and timestep.shape == x.shape[:1]
        assert not x.requires_grad and "sample_sigmas" in model_options["transformer_options"]
        return self.inner_model.apply_model(x, timestep)

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: "KSAMPLER",
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., None] | None = None,
        seed: int = 0,
    ) -> Tensor:
        assert isinstance(sampler, KSAMPLER) and sigmas.dtype == torch.float32 and sigmas.ndim == 1
        extra_args = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}}, "seed": seed}
        return sampler.sample(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar=True)


class KSamplerX0Inpaint:
    """Outside of the mask, the model sees the given latents with noise, and the given latents are what it denoised."""

    def __init__(self, model: Guider, sigmas: Tensor):
        self.inner_model, self.sigmas = model, sigmas

    def __call__(
        self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None, model_options: dict[str, Any], seed: int
    ) -> Tensor:
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)
        outside = 1 - denoise_mask
        sampling = self.inner_model.inner_model.model_sampling
        noisy = sampling.noise_scaling(sigma, self.noise, self.latent_image)
        x = x * denoise_mask + noisy * outside
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * outside


class KSAMPLER:
    def __init__(
        self,
        sampler_function: Callable[..., Tensor],
        extra_options: dict[str, Any] | None = None,
        inpaint_options: dict[str, Any] | None = None,
    ):
        # What `sample` passes must bind, before it is called.
        inspect.signature(sampler_function).bind(
            None, None, None, extra_args={}, callback=None, disable=False, **(extra_options or {})
        )
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}
        self.inpaint_options = inpaint_options or {}

    def sample(
        self,
        model_wrap: Guider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        extra_args["denoise_mask"] = denoise_mask
        model_k = KSamplerX0Inpaint(model_wrap, sigmas)
        model_k.latent_image, model_k.noise = latent_image, noise
        sampling = model_wrap.inner_model.model_sampling
        is_max = float(sigmas[0]) >= float(sampling.sigma_max) * (1 - 1e-5)
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, is_max)
        total = len(sigmas) - 1

        def k_callback(said: dict[str, Any]) -> None:
            assert said["denoised"].shape == said["x"].shape == noise.shape and 0 <= said["i"] < total
            if callback is not None:
                callback(said["i"], said["denoised"], said["x"], total)

        samples = self.sampler_function(
            model_k, x, sigmas, extra_args=extra_args, callback=k_callback, disable=disable_pbar, **self.extra_options
        )
        assert samples.shape == noise.shape
        return sampling.inverse_noise_scaling(sigmas[-1], samples)


def modules(models_dir: Path) -> dict[str, ModuleType]:
    """`comfy`, what of it the nodes import, and `folder_paths`, by name, for `sys.modules`."""
    comfy, folder_paths = ModuleType("comfy"), ModuleType("folder_paths")
    comfy.samplers, comfy.model_sampling = ModuleType("comfy.samplers"), ModuleType("comfy.model_sampling")
    comfy.samplers.KSAMPLER = KSAMPLER
    for kind in (EPS, V_PREDICTION, CONST, COSMOS_RFLOW, IMG_TO_IMG_FLOW, ModelSamplingFlux, ModelSamplingDiscrete):
        setattr(comfy.model_sampling, kind.__name__, kind)
    folder_paths.models_dir = str(models_dir)
    return {each.__name__: each for each in (comfy, comfy.samplers, comfy.model_sampling, folder_paths)}


def load_custom_node(folder: Path) -> ModuleType:
    """The package in `folder`, under the name that ComfyUI gives it."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
