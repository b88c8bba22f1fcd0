#!/usr/bin/env bash
# bash tools/try_package.sh [FOLDER]: build wheel and sdist, check them, install the wheel with the libraries that it asks for
# into an empty environment, and try it there. It needs a package index and about 6 GB; FOLDER is kept (default: a scratch one).
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"

"${PYTHON:-python3}" -m venv --clear "$folder/build" "$folder/empty"
"$folder/build/bin/pip" install --quiet build twine
git -C "$root" archive --prefix source/ HEAD | tar -x -C "$folder"
"$folder/build/bin/python" -m build --outdir "$folder/dist" "$folder/source"
"$folder/build/bin/twine" check --strict "$folder"/dist/*

cd "$folder"
empty/bin/pip install --quiet dist/*.whl
empty/bin/h2cache --version
empty/bin/h2cache --help > /dev/null
empty/bin/h2cache doctor
empty/bin/python - << 'PYTHON'
import torch
from diffusers import FluxTransformer2DModel

import h2cache
from h2cache.baselines import TeaCacheConfig

transformer = FluxTransformer2DModel(
    in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
latents = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
prompt = {"encoder_hidden_states": torch.ones(1, 8, 32), "pooled_projections": torch.ones(1, 32)}
ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
with h2cache.apply(transformer, h2cache.H2CacheConfig(tau1=9.0, tau2=9.0)) as handle, torch.no_grad():
    for step in range(4):
        transformer(latents, timestep=torch.tensor([1 - step / 4]), **prompt, **ids)
assert handle.summary()["steps"] == 4
assert handle.summary()["stages"]["structure"]["hit"] > 0
print(handle, TeaCacheConfig.__module__)
PYTHON
