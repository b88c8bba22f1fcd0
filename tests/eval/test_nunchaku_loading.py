"""Loading FLUX.1 in 4 bits: what nunchaku is asked for, and how the pipeline around its transformer is put together.

nunchaku is tests/engine_package.py, which writes its calls down, on a GPU that torch only claims to have: pipelines
stay on the CPU. Settings that are wrong everywhere are here, those that a machine does not allow in test_doctor.py.
"""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxPipeline, FluxTransformer2DModel
from engine_package import ADA, BLACKWELL, ENGINE, TURING, VERSION, assert_says, forget, give_gpus, install
from hydra.utils import instantiate
from omegaconf import OmegaConf
from repository import REPOSITORY

import h2cache
import run
from h2cache import H2CacheConfig
from h2cache.eval.errors import UserError
from h2cache.eval.models import loading, pipelines
from h2cache.eval.models.pipelines import DiffusersModelConfig, load_pipeline

CONFIGS = REPOSITORY / "configs"
CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 40}


@pytest.fixture(autouse=True)
def engine(monkeypatch, tmp_path):
    """nunchaku on an Ada GPU, with nothing loaded before."""
    give_gpus(monkeypatch, ADA)
    install(monkeypatch, tmp_path / "packages", ENGINE, VERSION)
    pipelines._load.cache_clear()
    yield
    pipelines._load.cache_clear()
    forget(pytest.MonkeyPatch())


@pytest.fixture(autouse=True)
def placed(monkeypatch) -> list:
    """What was asked of pipelines instead of moving them to a GPU: (where,) or (kind of offloading, where)."""
    placed = []
    monkeypatch.setattr(loading, "_moved", lambda model, device: ())
    monkeypatch.setattr(FluxPipeline, "to", lambda pipe, device: placed.append((str(device),)))
    for kind in ("model", "sequential"):
        monkeypatch.setattr(
            FluxPipeline,
            f"enable_{kind}_cpu_offload",
            lambda pipe, device, kind=kind: placed.append((kind, str(device))),
        )
    return placed


@pytest.fixture
def weights(tiny_pipe_folder, tmp_path) -> str:
    """The tiny transformer under the names that nunchaku gives to its files, with the precision left open."""
    for precision in ("int4", "fp4"):
        source = tiny_pipe_folder / "transformer"
        shutil.copy(source / "diffusion_pytorch_model.safetensors", tmp_path / f"svdq-{precision}_r32.safetensors")
        shutil.copy(source / "config.json", tmp_path / "config.json")
    return str(tmp_path / "svdq-{precision}_r32.safetensors")


def config(name: str = "nunchaku-flux1-dev", **fields):
    written = OmegaConf.load(CONFIGS / f"model/{name}.yaml")
    return instantiate(OmegaConf.merge(written, fields), _convert_="all")


def calls() -> list[tuple]:
    return sys.modules["nunchaku.models.transformers.calls"].CALLS


@pytest.mark.parametrize(
    ("capability", "dtype", "precision", "attention"),
    [
        (ADA, "bfloat16", "int4", "flashattn2"),
        (BLACKWELL, "bfloat16", "fp4", "flashattn2"),
        (TURING, "float16", "int4", "nunchaku-fp16"),
    ],
)
def test_v2_as_the_gpu_wants_it(
    monkeypatch, tiny_pipe_folder, weights, placed, capability, dtype, precision, attention
):
    give_gpus(monkeypatch, capability)
    pipe = load_pipeline(config(path=str(tiny_pipe_folder), weights=weights, dtype=dtype))
    assert type(pipe.transformer).__name__ == "NunchakuFluxTransformer2DModelV2"
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    placing = {"device": torch.device("cuda"), "torch_dtype": getattr(torch, dtype), "offload": False}
    assert calls() == [
        ("NunchakuFluxTransformer2DModelV2", weights.replace("{precision}", precision), placing),
        *[("set_processor", attention)] * blocks,
    ]
    assert placed == [("cuda",)]
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder_2)} == {getattr(torch, dtype)}


def test_v1_with_all_it_can_do(tiny_pipe_folder, weights, placed):
    """Its own offloading with diffusers' for the rest, fp16 attention, a LoRA and its strength, a 4-bit T5."""
    t5 = str(tiny_pipe_folder / "text_encoder_2")
    fields = {"offload": "sequential", "attention": "nunchaku-fp16", "device": "cuda:0", "text_encoder_2": t5}
    lora = {"lora": "XLabs-AI/flux-RealismLora/lora.safetensors", "lora_strength": 0.8}
    pipe = load_pipeline(config(path=str(tiny_pipe_folder), weights=weights, generation="v1", **fields, **lora))
    placing = {"device": torch.device("cuda:0"), "torch_dtype": torch.bfloat16}
    assert calls() == [
        ("NunchakuFluxTransformer2dModel", weights.replace("{precision}", "int4"), placing | {"offload": True}),
        ("set_attention_impl", "nunchaku-fp16"),
        ("update_lora_params", "XLabs-AI/flux-RealismLora/lora.safetensors"),
        ("set_lora_strength", 0.8),
        ("T5", t5, placing),
    ]
    assert placed == [("sequential", "cuda:0")]
    assert type(pipe.transformer).__name__ == "NunchakuFluxTransformer2dModel"


def test_the_pipeline_around_it_draws(tiny_pipe_folder, weights):
    """The same image as the pipeline in the folder, whose transformer has the same weights."""
    pipe = load_pipeline(config(path=str(tiny_pipe_folder), weights=weights))
    plain = FluxPipeline.from_pretrained(tiny_pipe_folder, dtype=torch.bfloat16, local_files_only=True)
    images = [np.asarray(each("red", generator=torch.manual_seed(0), **CALL).images[0]) for each in (pipe, plain)]
    assert np.array_equal(*images)


def test_a_model_is_loaded_once_for_all_its_calls(tiny_pipe_folder, weights):
    here = {"path": str(tiny_pipe_folder), "weights": weights}
    pipe = load_pipeline(config(**here))
    assert load_pipeline(config(**here, num_inference_steps=4, height=512, guidance_scale=1.0)) is pipe
    assert load_pipeline(config(**here, attention="nunchaku-fp16")) is not pipe


def test_nunchaku_is_not_heard(monkeypatch, tiny_pipe_folder, weights, capsys):
    """It prints while it loads, and its import would have every library's INFO messages shown."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # as in a program that has set up no logging, unlike pytest
    before = root.level
    load_pipeline(config(path=str(tiny_pipe_folder), weights=weights))
    assert capsys.readouterr().out == ""
    assert (root.level, root.handlers) == (before, [])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights": "nobody/model/x.safetensors"}, ["cannot fetch nobody/model/x.safetensors", "model.weights="]),
        ({"generation": "v1", "lora": "mine"}, ["mine does not load as a LoRA", "too short", "doctor=true"]),
        ({"text_encoder_2": "nowhere/t5"}, ["nowhere/t5", "hub", "model.text_encoder_2="]),
        ({"path": "nowhere"}, ["model.path=nowhere", "model_index.json"]),
    ],
)
def test_what_does_not_load_is_one_sentence(tiny_pipe_folder, weights, fields, words):
    with pytest.raises(UserError) as error:
        load_pipeline(config(**{"path": str(tiny_pipe_folder), "weights": weights} | fields))
    assert "\n" not in str(error.value)
    assert_says(str(error.value), *words)


def test_a_file_that_is_no_checkpoint(tiny_pipe_folder, tmp_path):
    (file := tmp_path / "half.safetensors").write_text("not weights")
    shutil.copy(tiny_pipe_folder / "transformer" / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"half\.safetensors does not load as nunchaku's weights"):
        load_pipeline(config(path=str(tiny_pipe_folder), weights=str(file)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"generation": "v3"}, ["generation='v3'", "v1, v2"]),
        ({"offload": "model"}, ["offload='model'", "none with generation=v2", "generation=v1 can offload"]),
        ({"generation": "v1", "offload": "group"}, ["offload='group'", "none or sequential with generation=v1"]),
        ({"lora": "a/b/c.safetensors"}, ["lora='a/b/c.safetensors'", "null with generation=v2", "generation=v1"]),
        ({"lora_strength": True}, ["lora_strength=True", "a number"]),
        ({"dtype": "float32"}, ["dtype='float32'", "bfloat16 or float16"]),
        ({"precision": "int8"}, ["precision='int8'", "auto, int4 or fp4"]),
        ({"attention": "sdpa"}, ["attention='sdpa'", "flashattn2", "nunchaku-fp16"]),
        ({"weights": "nunchaku-tech/nunchaku-flux.1-dev"}, ["weights=", "owner/name/file.safetensors"]),
        ({"height": 1000}, ["height=1000", "multiple of 16"]),
    ],
)
def test_a_setting_that_is_wrong_everywhere(fields, words):
    with pytest.raises(Exception) as error:
        config(**fields)
    assert isinstance(error.value.__cause__, ValueError)
    assert_says(str(error.value.__cause__), *words)


def test_the_papers_setting():
    """int4 weights of rank 32, RealismLora at 0.8, which only the first generation takes, 100 steps of 1024x1024."""
    model = config("nunchaku-flux1-dev-realism")
    assert (model.generation, model.precision, model.lora_strength) == ("v1", "int4", 0.8)
    assert "r32-flux.1-dev" in model.weights and model.lora == "XLabs-AI/flux-RealismLora/lora.safetensors"
    assert (model.num_inference_steps, model.height, model.width, model.dtype) == (100, 1024, 1024, "bfloat16")


def test_every_flux_model_has_its_teacache_polynomial():
    """Which `method=teacache` looks for under the model's name. In four steps there is too little to fit one to."""
    models = [file.stem for file in (CONFIGS / "model").iterdir()]
    flux = {name for name in models if not isinstance(config(name), DiffusersModelConfig)} - {"flux-mini-distilled"}
    assert len(flux) >= 7
    assert {file.stem for file in (CONFIGS / "teacache").iterdir()} >= flux


LITE = "nunchaku-flux1-lite"


@pytest.mark.parametrize(("capability", "precision"), [(ADA, "int4"), (BLACKWELL, "nvfp4")])
def test_nunchaku_lite_takes_the_checkpoint_for_the_gpu(monkeypatch, capability, precision):
    give_gpus(monkeypatch, capability)
    model = config(LITE)
    assert model.source() == f"lite-infer/flux.1-dev-nunchaku-lite-{precision}_r32-bnb4-text-encoder"
    assert model.hub_files == (model.source(),)


@pytest.mark.parametrize(
    "fields", [{"precision": "fp4"}, {"packages": "kernels"}, {"packages": [1]}, {"packages": None}]
)
def test_nunchaku_lite_checks_its_fields(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        config(LITE, **fields)


def test_nunchaku_lite_is_loaded_by_diffusers(monkeypatch, tiny_pipe_folder, tmp_path, placed):
    """A folder without quantization gives plain blocks, which diffusers' adapter caches. One with it comes as far as
    diffusers' quantizer, which wants CUDA kernels; what it says is one sentence.
    """
    monkeypatch.setattr("h2cache.eval.models.nunchaku.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    pipe = load_pipeline(config(LITE, path=str(tiny_pipe_folder), packages=[]))
    assert type(pipe.transformer) is FluxTransformer2DModel and placed == [("cuda",)]
    with h2cache.apply(pipe, H2CacheConfig()) as handle:
        pipe("red", generator=torch.manual_seed(0), **CALL)
    assert handle.summary()["steps"] == 2

    folder = shutil.copytree(tiny_pipe_folder, tmp_path / "lite")
    description = json.loads((folder / "transformer" / "config.json").read_text())
    targets = {"precision": "int4", "group_size": 64, "rank": 32, "targets": ["transformer_blocks.0.attn.to_q"]}
    description["quantization_config"] = {"quant_method": "nunchaku_lite", "svdq_w4a4": targets}
    (folder / "transformer" / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"does not load as a Flux pipeline \(.*[Nn]unchaku.*") as error:
        load_pipeline(config(LITE, path=str(folder), packages=[]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ([], ["model.generation=v1 model.offload=sequential", "awq-int4-flux.1-t5xxl", "model.height"]),
        (["model.generation=v1", "model.offload=sequential"], ["use model.text_encoder_2=", "model.height"]),
    ],
)
def test_too_little_memory(monkeypatch, tmp_path, tiny_pipe_folder, weights, capsys, fields, advice):
    """While it loads or while it draws: the advice is what this model can do."""

    def out_of_memory(*arguments: object, **named: object):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FluxPipeline, "from_pretrained", out_of_memory)
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.chdir(empty)
    here = [f"model.path={tiny_pipe_folder}", f'model.weights="{weights}"', "model=nunchaku-flux1-dev"]
    monkeypatch.setattr(sys, "argv", ["run.py", *here, *fields])
    with pytest.raises(SystemExit) as exit:
        run.main()
    stderr = capsys.readouterr().err
    assert (exit.value.code, stderr.count("\n"), list(empty.iterdir())) == (2, 1, [])
    assert_says(stderr, "does not fit into the GPU's memory", *advice)
    assert ("offload" in stderr) == (not fields)


def test_the_configs_say_what_they_are():
    """Every field of a model's configuration is written out in its file, so that --help and the record show it."""
    for file in (CONFIGS / "model").glob("nunchaku-*.yaml"):
        written = yaml.safe_load(file.read_text())
        assert set(written) - {"_target_"} == set(vars(instantiate(written)))
