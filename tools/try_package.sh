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
# README.md's Python block, on a pipeline of flux-mini's shape with random weights: the trained ones are not in the wheel.
mkdir -p assets
cp -r source/assets/flux-mini source/assets/plans assets
find assets/flux-mini -name '*.safetensors' -delete
sed '/^```python$/,/^```$/!d' source/README.md | sed '/^```/d' > readme.py
empty/bin/python - << 'PYTHON'
import runpy

import diffusers
import transformers

import h2cache
from h2cache.baselines import TeaCacheConfig

folder = "assets/flux-mini"
for name, kind in {"transformer": diffusers.FluxTransformer2DModel, "vae": diffusers.AutoencoderKL}.items():
    kind.from_config(kind.load_config(folder, subfolder=name)).save_pretrained(f"{folder}/{name}")
for name, kind in {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.T5EncoderModel}.items():
    kind(kind.config_class.from_pretrained(folder, subfolder=name)).save_pretrained(f"{folder}/{name}")
made = runpy.run_path("readme.py")
assert "site-packages" in h2cache.__file__, h2cache.__file__
assert made["handle"].summary()["steps"] == 50 and made["image"].size == (128, 128)
print(made["handle"], made["plan"], TeaCacheConfig.__module__)
PYTHON
