"""Why nunchaku cannot run here, one sentence for each reason, and the doctor, which tells the state of the machine."""

import re
import sys
from io import StringIO

import pytest
import torch
from engine_package import (
    ADA,
    BLACKWELL,
    CHANGE_POINTS,
    CORE,
    ENGINE,
    HOPPER,
    SERIES,
    TURING,
    VERSION,
    VOLTA,
    assert_says,
    forget,
    give_gpus,
    install,
)
from hydra.utils import instantiate
from omegaconf import OmegaConf
from repository import REPOSITORY
from rich.console import Console

import run
from h2cache.eval.cli import doctor
from h2cache.eval.errors import UserError
from h2cache.eval.models.pipelines import load_pipeline

RELEASES = "https://github.com/nunchaku-ai/nunchaku/releases"
WHEEL = f"torch {SERIES}"


@pytest.fixture(autouse=True)
def no_nunchaku(monkeypatch):
    """Whatever a test installs or imports under the name is gone when it ends."""
    forget(monkeypatch)
    yield
    forget(pytest.MonkeyPatch())


def config(name: str = "nunchaku-flux1-dev", **fields):
    written = OmegaConf.load(REPOSITORY / f"configs/model/{name}.yaml")
    return instantiate(OmegaConf.merge(written, fields), _convert_="all")


def reason(model) -> str:
    """The sentence that `check` raises; loading must not get further either."""
    with pytest.raises(UserError) as error:
        model.check()
    with pytest.raises(UserError) as on_loading:
        load_pipeline(model)
    message = str(error.value)
    assert str(on_loading.value) == message
    assert "\n" not in message and len(re.sub(r"/\S+", "", message)) < 400  # however long this machine's paths are
    return message


@pytest.mark.parametrize("name", ["nunchaku-flux1-dev", "nunchaku-flux1-dev-realism", "nunchaku-flux1-schnell"])
def test_no_gpu(monkeypatch, name):
    give_gpus(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert_says(reason(config(name)), "needs an NVIDIA GPU", "finds none", "nvidia-smi", "model=flux-mini")


def test_no_gpu_is_the_reason_where_weights_would_wait_on_the_cpu_too(monkeypatch):
    give_gpus(monkeypatch)
    assert "needs an NVIDIA GPU" in reason(config(generation="v1", offload="sequential"))


def test_a_torch_without_cuda(monkeypatch):
    give_gpus(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert_says(reason(config()), "torch built for CUDA", torch.__version__, "pytorch.org", "model=flux-mini")


def test_the_cpu_beside_a_gpu(monkeypatch):
    give_gpus(monkeypatch, ADA)
    assert_says(reason(config(device="cpu")), "model.device=cpu", "GPUs only", "model.device=cuda")


@pytest.mark.parametrize(
    ("capability", "words"),
    [(HOPPER, ["sm_90, Hopper"]), (VOLTA, ["sm_70, Volta"]), ((8, 7), ["sm_87"]), ((10, 0), ["sm_100"])],
)
def test_a_gpu_without_kernels(monkeypatch, capability, words):
    """Which no package can change: it is said before the package is looked for."""
    give_gpus(monkeypatch, capability)
    supported = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_120"]
    assert_says(reason(config()), "NVIDIA Test GPU", *words, *supported, "model=flux1-dev")


@pytest.mark.parametrize("capability", [TURING, (8, 0), (8, 6), ADA, BLACKWELL])
def test_a_gpu_with_kernels_but_no_nunchaku(monkeypatch, capability):
    give_gpus(monkeypatch, capability)
    monkeypatch.setattr("h2cache.eval.models.diagnosis.find_spec", lambda name: None)
    trap = "`pip install nunchaku` would install another project"
    assert_says(reason(config()), "nunchaku is not installed", RELEASES, WHEEL, f"cp{sys.version_info.major}", trap)


def test_the_other_nunchaku(monkeypatch, tmp_path):
    """What `pip install nunchaku` installs, told by what it lacks: a version of 3.0 would not make it the engine."""
    give_gpus(monkeypatch, ADA)
    summary = "Optimally partitioning data into piece-wise linear segments."
    install(monkeypatch, tmp_path, CHANGE_POINTS, "3.0", summary)
    message = reason(config())
    assert_says(message, "nunchaku 3.0", "piece-wise linear segments)", "another project", RELEASES, WHEEL)
    assert "`pip uninstall nunchaku`" in message


def test_a_folder_of_the_name_in_the_way(monkeypatch, tmp_path):
    give_gpus(monkeypatch, ADA)
    (folder := tmp_path / "nunchaku").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_says(reason(config()), str(folder), "another project", f"move {folder} out of the way")


@pytest.mark.parametrize("version", ["0.3.1+torch2.7", "1.1.0+torch2.9"])
def test_a_version_too_old(monkeypatch, tmp_path, version):
    give_gpus(monkeypatch, ADA)
    install(monkeypatch, tmp_path, ENGINE, version)
    assert_says(reason(config()), f"nunchaku {version}", "older than 1.2", RELEASES, WHEEL)


def test_a_source_tree_that_was_not_compiled(monkeypatch, tmp_path):
    give_gpus(monkeypatch, ADA)
    folder = install(monkeypatch, tmp_path, ENGINE | {CORE: None}, VERSION)
    assert_says(reason(config()), "no compiled core", str(folder), RELEASES)


def test_a_wheel_for_another_python(monkeypatch, tmp_path):
    give_gpus(monkeypatch, ADA)
    other = "_C.cpython-37m-x86_64-linux-gnu.so"
    install(monkeypatch, tmp_path, ENGINE | {CORE: None, other: ""}, VERSION)
    assert_says(reason(config()), "another Python", other, sys.version.split()[0], RELEASES)


def test_a_wheel_for_another_torch(monkeypatch, tmp_path):
    give_gpus(monkeypatch, ADA)
    install(monkeypatch, tmp_path, ENGINE, "1.2.1+cu12.8torch2.1")
    assert_says(reason(config()), "built for torch 2.1,", f"not for the torch {torch.__version__}", RELEASES, WHEEL)


def test_a_wheel_for_another_cuda(monkeypatch, tmp_path):
    give_gpus(monkeypatch, ADA)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    install(monkeypatch, tmp_path, ENGINE, f"1.2.1+cu12.8torch{SERIES}")
    assert_says(reason(config()), "built for CUDA 12.8", "CUDA 13.2", RELEASES, WHEEL)


IMPORTS = {
    "raise ImportError('/x/_C.so: undefined symbol: _ZN3c106detail23torchInternalAssertFailEPKc')": [
        "misses the symbol _ZN3c106detail23torchInternalAssertFailEPKc",
        f"built for another torch; install the engine's wheel for {WHEEL}",
    ],
    "raise ImportError('libcudart.so.12: cannot open shared object file')": ["ImportError: libcudart.so.12", RELEASES],
    "raise RuntimeError('operator nunchaku::gemm already exists')": ["RuntimeError: operator nunchaku::gemm", RELEASES],
    "import a_package_that_is_not_here": ["needs the package a_package_that_is_not_here", "pip install a_package"],
}


@pytest.mark.parametrize("program", IMPORTS)
def test_an_import_that_fails(monkeypatch, tmp_path, program):
    give_gpus(monkeypatch, ADA)
    install(monkeypatch, tmp_path, ENGINE | {"__init__.py": program}, VERSION)
    assert_says(reason(config()), f"nunchaku {VERSION}", *IMPORTS[program])


@pytest.mark.parametrize(
    ("generation", "left_out", "name"),
    [
        ("v1", "__init__.py", "nunchaku.NunchakuFluxTransformer2dModel"),
        ("v2", "models/transformers/transformer_flux_v2.py", "NunchakuFluxTransformer2DModelV2"),
    ],
)
def test_a_nunchaku_that_lacks_the_generation(monkeypatch, tmp_path, generation, left_out, name):
    give_gpus(monkeypatch, ADA)
    without = "" if left_out == "__init__.py" else None
    install(monkeypatch, tmp_path, ENGINE | {left_out: without}, VERSION)
    assert_says(reason(config(generation=generation)), f"nunchaku {VERSION} has no", name, RELEASES)


@pytest.mark.parametrize(
    ("capabilities", "fields", "words"),
    [
        ([TURING], {}, ["model.dtype=bfloat16", "sm_75, Turing", "model.dtype=float16"]),
        (
            [TURING],
            {"dtype": "float16", "attention": "flashattn2"},
            ["attention=flashattn2", "attention=nunchaku-fp16"],
        ),
        ([ADA], {"precision": "fp4"}, ["model.precision=fp4", "runs int4 only", "model.precision=auto"]),
        ([BLACKWELL], {"precision": "int4"}, ["model.precision=int4", "runs fp4 only", "model.precision=auto"]),
        ([ADA, BLACKWELL], {"device": "cuda:1"}, ["model.device=cuda:1", "cuda:0", "CUDA_VISIBLE_DEVICES=1"]),
        ([ADA], {"device": "cuda:1"}, ["model.device=cuda:1 is not there"]),
    ],
)
def test_settings_that_the_gpu_does_not_allow(monkeypatch, tmp_path, capabilities, fields, words):
    give_gpus(monkeypatch, *capabilities)
    install(monkeypatch, tmp_path, ENGINE, VERSION)
    assert_says(reason(config(**fields)), *words)


@pytest.mark.parametrize(
    ("capabilities", "fields"),
    [
        ([ADA], {}),
        ([BLACKWELL], {}),
        ([TURING], {"dtype": "float16"}),
        ([ADA], {"generation": "v1", "offload": "sequential", "lora": "a/b/c.safetensors"}),
        ([ADA, BLACKWELL], {"device": "cuda:1", "generation": "v1"}),
    ],
)
def test_nothing_stands_in_the_way(monkeypatch, tmp_path, capabilities, fields):
    give_gpus(monkeypatch, *capabilities)
    install(monkeypatch, tmp_path, ENGINE, VERSION)
    config(**fields).check()


def test_an_engine_built_here_does_not_say_for_which_torch(monkeypatch, tmp_path):
    give_gpus(monkeypatch, ADA)
    install(monkeypatch, tmp_path, ENGINE, "1.2.1")
    config().check()


@pytest.mark.parametrize(
    ("capabilities", "fields", "trust", "words"),
    [
        ([], {}, True, ["nunchaku_lite needs an NVIDIA GPU", "model=flux-mini"]),
        ([HOPPER], {}, True, ["sm_90, Hopper", "Turing, Ampere, Ada and Blackwell", "model=flux1-dev"]),
        ([VOLTA], {}, True, ["sm_70, Volta"]),
        ([ADA], {"precision": "nvfp4"}, True, ["needs a Blackwell GPU", "model.precision=int4"]),
        ([ADA], {"packages": ["torch", "no_such_package"]}, True, ["needs no_such_package", "`pip install no_such_p"]),
        ([ADA], {"packages": []}, False, ["nunchaku-lite-kernels", "DIFFUSERS_TRUST_REMOTE_KERNELS=true"]),
    ],
)
def test_why_nunchaku_lite_cannot_run(monkeypatch, capabilities, fields, trust, words):
    give_gpus(monkeypatch, *capabilities)
    monkeypatch.setattr("h2cache.eval.models.nunchaku.DIFFUSERS_TRUST_REMOTE_KERNELS", trust)
    assert_says(reason(config("nunchaku-flux1-lite", **fields)), *words)


@pytest.mark.parametrize("name", ["nunchaku-flux1-dev", "nunchaku-flux1-lite"])
def test_on_the_command_line_it_is_one_sentence_and_exit_code_2(monkeypatch, tmp_path, capsys, name):
    give_gpus(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", f"model={name}"])
    with pytest.raises(SystemExit) as exit:
        run.main()
    stdout, stderr = capsys.readouterr()
    assert (exit.value.code, stdout, stderr.count("\n")) == (2, "", 1)
    assert re.fullmatch(r"run\.py: error: nunchaku(_lite)? needs an NVIDIA GPU.*\n", stderr)


def ask_doctor(width: int = 120) -> str:
    terminal = StringIO()
    doctor.show(Console(width=width, file=terminal))
    return terminal.getvalue()


def verdict_of(model: str) -> str:
    return next(verdict for (verdict, _), names in doctor.verdicts().items() if model in names)


@pytest.mark.parametrize("width", [80, 120])
def test_the_doctor_tells_of_this_machine_and_of_every_model(width):
    """The width is kept, no sentence is cut, and models of one fate stand together."""
    told = ask_doctor(width)
    assert max(map(len, told.splitlines())) <= width
    words = " ".join(told.split())
    for name, value in doctor.machine():
        assert " ".join(f"{name} {value}".split()) in words
    assert f"torch {torch.__version__}" in words and f"Python {sys.version.split()[0]}" in words
    models = [name for names in doctor.verdicts().values() for name in names]
    assert sorted(models) == sorted(file.stem for file in (REPOSITORY / "configs/model").iterdir())
    for (verdict, why), names in doctor.verdicts().items():
        assert f"{verdict} {', '.join(names)} {why}" in words


def test_the_doctor_sees_gpus_and_the_engine(monkeypatch, tmp_path):
    give_gpus(monkeypatch, ADA, HOPPER)
    gpu = type("", (), {"name": "NVIDIA Test GPU", "major": 8, "minor": 9, "total_memory": 24 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    folder = install(monkeypatch, tmp_path, ENGINE, VERSION)
    facts = dict(doctor.machine())
    assert facts["GPU 0"] == facts["GPU 1"] == "NVIDIA Test GPU, sm_89, 24.0 GiB"
    assert facts["nunchaku"] == f"{VERSION} in {folder}"
    assert "GPU" not in facts


def test_a_model_runs_from_disk_from_the_cache_or_after_a_download(monkeypatch, tmp_path):
    give_gpus(monkeypatch, ADA)
    monkeypatch.setattr("h2cache.eval.cli.doctor.is_cached", lambda name: False)
    monkeypatch.setattr("h2cache.eval.cli.doctor.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    install(monkeypatch, tmp_path, ENGINE, VERSION)
    assert verdict_of("flux-mini") == "yes"
    verdict, why = doctor.examine(config("nunchaku-flux1-dev-realism"))
    assert verdict == "after a download"
    weights = "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors"
    assert_says(why, weights, "XLabs-AI/flux-RealismLora/lora.safetensors", "black-forest-labs/FLUX.1-dev", "hf auth")

    monkeypatch.setattr("h2cache.eval.cli.doctor.get_token", lambda: "hf_x")
    assert "login" not in doctor.examine(config())[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_says(" ".join(doctor.examine(config("flux1-dev"))), "no ", "HF_HUB_OFFLINE is set")
    monkeypatch.setattr("h2cache.eval.cli.doctor.is_cached", lambda name: True)
    assert doctor.examine(config("flux1-dev")) == ("yes", "on NVIDIA Test GPU, from the local cache")


def test_what_is_in_the_cache(monkeypatch, tmp_path):
    """A pipeline is there if its index is; a single file if that file is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / "0"
    (snapshot / "inner").mkdir(parents=True)
    (tmp_path / "models--somebody--model" / "refs").mkdir()
    (tmp_path / "models--somebody--model" / "refs" / "main").write_text("0")
    (snapshot / "inner" / "a.safetensors").write_text("")
    assert doctor.is_cached("somebody/model/inner/a.safetensors")
    assert not doctor.is_cached("somebody/model")
    (snapshot / "model_index.json").write_text("{}")
    assert doctor.is_cached("somebody/model")
    assert not doctor.is_cached("nobody/model")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 580.95.05", "580.95.05"),
        ("printf '580.95.05\\n580.95.05\\n'", "580.95.05"),
        ("exit 9", "does not answer"),
        ("sleep 5", "does not answer"),
    ],
)
def test_the_driver(monkeypatch, tmp_path, script, says):
    """As nvidia-smi tells, even if it fails or hangs."""
    (program := tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "DRIVER_SECONDS", 0.5)
    assert says in dict(doctor.machine())["driver"]


def test_the_doctor_on_the_command_line(monkeypatch, tmp_path, capsys):
    """Exit code 0, whatever else is asked for, and no file; a value that is neither yes nor no is an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "doctor=true", "model=nunchaku-flux1-dev", "out=no/such/folder.png"])
    run.main()
    stdout, stderr = capsys.readouterr()
    assert stderr == "" and "nunchaku-flux1-lite" in stdout and torch.__version__ in stdout
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(sys, "argv", ["run.py", "doctor=3"])
    with pytest.raises(SystemExit) as exit:
        run.main()
    assert exit.value.code == 2 and "true or false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gib", "offload", "says"),
    [
        (24, "none", ("33.7 GB", "25.8 GB", "model.offload=model", "23.8 GB")),
        (16, "none", ("33.7 GB", "17.2 GB", "model.offload=group")),
        (16, "model", ("23.8 GB", "17.2 GB", "model.offload=group")),
        (24, "model", None),
        (16, "group", None),
        (80, "none", None),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_what_helps(monkeypatch, gib, offload, says):
    give_gpus(monkeypatch, ADA)
    gpu = type("", (), {"name": "NVIDIA Test GPU", "major": 8, "minor": 9, "total_memory": gib * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    found = doctor.too_large(config("flux1-dev", offload=offload), 33.7, 23.8)
    if says is None:
        assert found is None
    else:
        assert found[0] == "no"
        assert_says(found[1], *says)


def test_the_memory_of_every_large_model_is_known():
    known = OmegaConf.load(REPOSITORY / "configs/memory.yaml")
    names = {file.stem for file in (REPOSITORY / "configs/model").iterdir()}
    assert set(known) == {name for name in names if not name.startswith(("nunchaku", "flux-mini", "hunyuan-mini"))}
    assert all(0 < each.largest < each["all"] for each in known.values())
