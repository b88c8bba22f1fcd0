"""Stage 2: the ControlNet, trained by rectified flow through the frozen flux-mini.

It starts from flux-mini's own first blocks; what it adds to flux-mini's blocks starts at zero. Beside the flow it is
asked directly, by a linear head on its last block that is not exported, how the picture's latents differ from the small
picture's: for the first steps only that, which costs a third.
"""

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel, FluxPipeline

from tools.flux_mini.training import Average, Log, advance, resume, save, set_rate, stage_options
from tools.flux_mini.transformer import TOKENS, attention, speed_up_blocks

from .pool import Pool

BASE = Path(__file__).resolve().parents[2] / "assets/flux-mini"
DOUBLE, SINGLE = 2, 4
GUIDANCE = 1.0
SCENES, SEED_OF_SCENES = 16_384, 7
FIRST_SCENES, SCENES_A_STEP = 1024, 1.5
ALONE = 1000  # steps
WARMUP, DECAY = 50, 0.3
HEAD_LOSS = 0.5
PROJECTION_RATE = 4.0  # times the others': they start at zero
SHIFT = 1.0  # of noise levels, where the picture has to say what the noise does not
COLUMNS = ("flow", "head", "grad_norm")


class Upscaler(torch.nn.Module):
    """What is trained, and beside it, outside its parameters, the frozen transformer that it steers."""

    def __init__(self, pipe: FluxPipeline):
        super().__init__()
        base = pipe.transformer.requires_grad_(False)
        heads = {name: base.config[name] for name in ("attention_head_dim", "num_attention_heads")}
        self.controlnet = FluxControlNetModel.from_transformer(
            base, num_layers=DOUBLE, num_single_layers=SINGLE, **heads
        )
        # The small picture is read as the noisy one is, instead of not at all.
        self.controlnet.controlnet_x_embedder.load_state_dict(base.x_embedder.state_dict())
        self.head = torch.nn.Linear(base.inner_dim, base.config.in_channels)
        torch.nn.init.zeros_(self.head.weight)
        self._outside = [base]
        self.controlnet.controlnet_single_blocks[-1].register_forward_pre_hook(self._remember)
        rows = torch.arange(8)
        ids = torch.stack([torch.zeros(8, 8), rows[:, None].expand(8, 8), rows[None, :].expand(8, 8)], dim=-1)
        self.register_buffer("image_ids", ids.reshape(TOKENS, 3), persistent=False)

    def _remember(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.last = inputs[0]

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for the rest, and Muon for the projections, last."""
        projections, matrices, others = [], [], []
        for name, parameter in self.named_parameters():
            is_projection = name.startswith(("controlnet.controlnet_blocks.", "controlnet.controlnet_single_blocks."))
            is_matrix = parameter.ndim == 2 and "blocks." in name
            (others if not is_matrix else projections if is_projection else matrices).append(parameter)

        def muon(parameters: list[torch.nn.Parameter]) -> torch.optim.Muon:
            return torch.optim.Muon(parameters, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

        rest = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        return [muon(matrices), rest, muon(projections)]

    @property
    def base(self) -> torch.nn.Module:
        return self._outside[0]

    def forward(self, x, t, batch: dict[str, torch.Tensor], alone: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The velocity (None if `alone`: without flux-mini), and the latents that the head makes of the control's."""
        call = {
            "hidden_states": x,
            "encoder_hidden_states": batch["states"],
            "pooled_projections": batch["pooled"],
            "timestep": t,
            "guidance": torch.full_like(t, GUIDANCE),
            "img_ids": self.image_ids,
            "txt_ids": x.new_zeros(batch["states"].shape[1], 3),
        }
        double, single = self.controlnet(controlnet_cond=batch["control"], return_dict=False, **call)
        latents = batch["control"] + self.head(self.last)
        if alone:
            return None, latents
        samples = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        return self.base(**call, **samples).sample, latents


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal t under FLUX's exponential shift, further to the noise than flux-mini's own."""
    t = torch.sigmoid(torch.randn(count, generator=generator))
    return math.exp(SHIFT) / (math.exp(SHIFT) + 1 / t - 1)


def rate(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up, then 1, then linearly to 0 over the last DECAY of the steps.

    Where the end is decided later, the steps before the decay are the same.
    """
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    pipe = FluxPipeline.from_pretrained(BASE, dtype=torch.float32).to(device)
    pool = Pool(work, pipe, SCENES, SEED_OF_SCENES)
    model = Upscaler(pipe).to(device)
    trained = list(model.parameters())
    average, optims = Average(trained, decay=0.998), model.optimizers(learning_rate)
    checkpoint = work / "upscaler.pt"
    start = resume(checkpoint, model=model, average=average, optimizers=optims)
    speed_up_blocks(model.base, model.controlnet)
    log = Log(work / "upscaler.csv", COLUMNS, start)
    totals, since = dict.fromkeys(COLUMNS, 0.0), start
    for step in range(start, steps):
        pool.grow(FIRST_SCENES + int(SCENES_A_STEP * step))
        now = learning_rate * rate(step, steps)
        set_rate(optims[:2], now)
        set_rate(optims[2:], PROJECTION_RATE * now)
        rng = random.Random(f"upscaler-{seed}-{step}")
        examples = pool.batch(rng, batch, device)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        x0 = examples["latents"]
        noise = torch.randn(x0.shape, generator=generator).to(device)
        t = noise_levels(batch, generator).to(device)
        x = torch.lerp(x0, noise, t[:, None, None])
        velocity, latents = model(x, t, examples, alone=step < ALONE)
        head = F.mse_loss(latents, x0)
        loss = HEAD_LOSS * head
        if velocity is not None:
            flow = F.mse_loss(velocity, noise - x0)
            loss = loss + flow
            totals["flow"] += flow.item()
        loss.backward()
        totals["head"] += head.item()
        totals["grad_norm"] += advance(optims, trained)
        average.update()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            log.write(step + 1, **{name: total / (step + 1 - since) for name, total in totals.items()})
            totals, since = dict.fromkeys(COLUMNS, 0.0), step + 1
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save(checkpoint, step + 1, model=model, average=average, optimizers=optims)


def main() -> None:
    options = stage_options(__doc__, steps=10000, batch=16, learning_rate=1.5e-3)
    with attention(options.device):
        train(options.work, options.steps, options.batch, options.learning_rate, options.seed, options.device)


if __name__ == "__main__":
    main()
