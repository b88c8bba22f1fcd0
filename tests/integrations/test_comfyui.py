"""The ComfyUI nodes, on the stand-in for what they touch of ComfyUI, against our own scheduler and pipeline."""

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from plans import PLAN, plans
from repository import REPOSITORY
from standins import comfyui

import h2cache
from h2cache import Plan, PlanConfig, PlanScheduler
from h2cache.plans.export import as_json, as_sampler


def with_sigmas(plan, sigmas):
    """The plan for the noise levels of its steps."""
    return replace(plan, made_for=replace(plan.made_for, sigmas=tuple(sigmas)))


FOLDER = REPOSITORY / "integrations" / "comfyui"
PLAIN = with_sigmas(PLAN, [1 - step / 8 for step in range(8)])
EULER = with_sigmas(Plan.euler(4), [1.0, 0.8, 0.5, 0.2])


@pytest.fixture(scope="module")
def package():
    """The custom-node package, loaded before there is any ComfyUI."""
    assert "comfy" not in sys.modules
    before = set(sys.modules)
    yield comfyui.load_custom_node(FOLDER)
    for name in set(sys.modules) - before:
        if name.startswith(str(FOLDER).replace(".", "_x_")):
            del sys.modules[name]


@pytest.fixture
def nodes(package, monkeypatch, tmp_path):
    """The node classes by name, with the stand-in in the place of ComfyUI."""
    (tmp_path / "h2cache_plans").mkdir()
    for name, module in comfyui.modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    return package.NODE_CLASS_MAPPINGS


@pytest.fixture
def loaded(nodes, tmp_path):
    """From a plan to what the three nodes make of its export: (plan, sigmas, sampler)."""

    def load(plan):
        (tmp_path / "h2cache_plans" / "a.json").write_text(as_json(plan))
        table = run(nodes["H2CacheLoadPlan"], plan_name="a.json")
        return table, run(nodes["H2CachePlanScheduler"], plan=table), run(nodes["H2CachePlanSampler"], plan=table)

    return load


def run(node, **inputs):
    """The only output of a node."""
    (output,) = getattr(node(), node.FUNCTION)(**inputs)
    return output


def flow_guider(velocity):
    """The guider of a flow model whose noise levels are its timesteps."""
    sampling = comfyui.model_sampling(comfyui.ModelSamplingFlux, comfyui.CONST)
    return comfyui.Guider(comfyui.Model(velocity, sampling))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def curved(x, sigma):
    """A velocity that depends on sample and noise level."""
    return torch.tanh(x) + x.flip(-1) * sigma.view(-1, *[1] * (x.ndim - 1)) ** 2


def scheduled(plan, x, start=0):
    """The samples that our scheduler makes with the same velocity, from a computed step on."""
    scheduler = PlanScheduler(plan)
    scheduler.set_timesteps(sigmas=list(plan.made_for.sigmas))
    scheduler.set_begin_index(start)
    for timestep, sigma in zip(scheduler.timesteps[start:], scheduler.sigmas[start:-1], strict=True):
        (x,) = scheduler.step(curved(x, sigma.expand(len(x))), timestep, x, return_dict=False)
    return x


def test_flux_mini_draws_what_the_pipeline_with_the_plan_draws(flux_mini, loaded):
    """Load, scheduler, sampler, ComfyUI's KSAMPLER and the model: the latents of FluxPipeline with `h2cache.apply`."""
    plan, calls = Plan.load(REPOSITORY / "assets/plans/flux-mini-4.json"), []
    hook = flux_mini.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    call = dict(height=128, width=128, guidance_scale=3.5, max_sequence_length=64, output_type="latent")
    with h2cache.apply(flux_mini, PlanConfig(plan, allow_transfer=True)) as handle:
        drawn = flux_mini(
            "a red stop sign", num_inference_steps=50, generator=torch.Generator().manual_seed(3), **call
        ).images
        levels = handle.scheduler.base.sigmas[:-1].tolist()
    hook.remove()
    assert len(calls) == len(plan.computed)

    def transformer(x, timestep):
        return flux_mini.transformer(**{**calls[0], "hidden_states": x, "timestep": timestep})[0]

    _, sigmas, sampler = loaded(with_sigmas(plan, levels))
    start = calls[0]["hidden_states"]
    with torch.no_grad():
        latents = flow_guider(transformer).sample(start, torch.zeros_like(start), sampler, sigmas)
    assert drawn.abs().max() > 1 and drawn.shape == latents.shape
    torch.testing.assert_close(latents, drawn, atol=1e-4, rtol=0)


@given(plan=plans())
def test_any_plan_gives_the_samples_of_our_scheduler(package, plan):
    plan = with_sigmas(plan, [1 - step / plan.steps for step in range(plan.steps)])
    sampler = sys.modules[f"{package.__name__}.plan_sampler"]
    table = sampler.PlanTable.from_json(as_json(plan))
    x, sigmas = noise(2, 3, 4), torch.tensor(table.sigmas)
    made = sampler.sample_plan(
        lambda x, sigma: x - sigma.view(-1, 1, 1) * curved(x, sigma), x, sigmas, disable=True, plan=table
    )
    expected = scheduled(plan, x)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_an_exported_file_samples_alike(package):
    """The Python file for other programs, and the JSON that the nodes read."""
    sampler, other = sys.modules[f"{package.__name__}.plan_sampler"], ModuleType("other")
    exec(compile(as_sampler(PLAIN), "other.py", "exec"), vars(other))
    table = sampler.PlanTable.from_json(as_json(PLAIN))

    def model(x, sigma):
        return x - sigma.view(-1, 1) * curved(x, sigma)

    made = sampler.sample_plan(model, noise(2, 4), torch.tensor(table.sigmas), disable=True, plan=table)
    torch.testing.assert_close(made, other.sample_plan(model, noise(2, 4)), rtol=1e-6, atol=1e-6)


def test_image_to_image_starts_in_the_middle_as_our_scheduler_does(loaded):
    """As SplitSigmas cuts them. Strides of outputs that were not computed fall on the newest."""
    _, sigmas, sampler = loaded(PLAIN)
    clean, start = noise(2, 4, 6), noise(2, 4, 6, seed=1)
    made = flow_guider(curved).sample(start, clean, sampler, sigmas[2:])
    expected = scheduled(PLAIN, sigmas[2] * start + (1 - sigmas[2]) * clean, start=2)
    torch.testing.assert_close(made, expected)


def test_a_run_may_end_in_the_middle(loaded):
    """The first part of a run, as two samplers in a row have it: the sample at the last sigma, over 1 - sigma."""
    _, sigmas, sampler = loaded(EULER)
    start = noise(1, 4)
    made = flow_guider(curved).sample(start, torch.zeros(1, 4), sampler, sigmas[:2])
    expected = (start + (sigmas[1] - sigmas[0]) * curved(start, sigmas[:1])) / (1 - sigmas[1])
    torch.testing.assert_close(made, expected)


def test_what_is_outside_the_mask_stays(loaded):
    _, sigmas, sampler = loaded(PLAIN)
    image, mask = noise(1, 4, 6, seed=1), torch.zeros(1, 1, 6)
    mask[..., :3] = 1
    made = flow_guider(curved).sample(noise(1, 4, 6), image, sampler, sigmas, denoise_mask=mask)
    torch.testing.assert_close(made[..., 3:], image[..., 3:])
    assert (made[..., :3] - image[..., :3]).abs().min() > 1e-3


def test_each_step_is_told_with_the_sample_before_it(loaded):
    """ComfyUI draws its preview from what is denoised, and counts steps from 0."""
    _, sigmas, sampler = loaded(EULER)
    said, start = [], noise(1, 4)
    flow_guider(curved).sample(
        start, torch.zeros(1, 4), sampler, sigmas, callback=lambda *each: said.append(each), seed=7
    )
    assert [(step, total) for step, _, _, total in said] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    _, denoised, x, _ = said[0]
    torch.testing.assert_close(x, start)
    torch.testing.assert_close(denoised, start - curved(start, sigmas[:1]))


@pytest.mark.parametrize(
    ("levels", "kind", "named"),
    [
        ("ModelSamplingDiscrete", "EPS", "ModelSamplingDiscrete with EPS"),
        ("ModelSamplingDiscrete", "V_PREDICTION", "V_PREDICTION"),
        ("ModelSamplingDiscrete", "COSMOS_RFLOW", "COSMOS_RFLOW"),
        ("ModelSamplingFlux", "IMG_TO_IMG_FLOW", "IMG_TO_IMG_FLOW"),
    ],
)
def test_other_models_are_refused_before_they_are_called(loaded, levels, kind, named):
    _, sigmas, sampler = loaded(EULER)
    sampling = comfyui.model_sampling(getattr(comfyui, levels), getattr(comfyui, kind))
    guider = comfyui.Guider(comfyui.Model(lambda x, timestep: pytest.fail("the model was called"), sampling))
    with pytest.raises(ValueError, match=f"for flow models .* has .*{named}"):
        sampler.sample(guider, sigmas, {"model_options": {}, "seed": 0}, None, noise(1, 4), torch.zeros(1, 4))


@pytest.mark.parametrize(
    "sigmas",
    [[1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.8, 0.0], [0.8, 1.0], [1.0, 0.8, 0.5, 0.2, 0.0, 0.0], []],
    ids=["another scheduler's", "a gap", "flipped", "too many", "none"],
)
def test_sigmas_of_another_scheduler_are_refused(loaded, package, sigmas):
    table, _, _ = loaded(EULER)
    with pytest.raises(ValueError, match="are not the plan's"):
        table.steps(sigmas)


def test_the_calibration_sampler_draws_as_euler_and_makes_a_plan(nodes, tmp_path):
    """With a quarter of the calls, the plan ends nearer to the run that it was made on than Euler's method does with
    as many."""
    levels = torch.linspace(1, 0, 25) ** 1.5
    start, calls = noise(3, 4, 6), []

    def velocity(x, sigma):
        calls.append(sigma[0].item())
        return curved(x, sigma)

    sampler = run(nodes["H2CacheCalibrationSampler"], budget=4.0, plan_name="own-4.json")
    guider, said = flow_guider(velocity), []
    drawn = guider.sample(start, torch.zeros_like(start), sampler, levels, callback=lambda *each: said.append(each))
    expected = start
    for sigma, later in pairwise(levels):
        expected = expected + (later - sigma) * curved(expected, sigma.expand(3))
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert [step for step, *_ in said] == list(range(24)) and len(calls) == 24 + 6
    torch.testing.assert_close(said[0][1], start - curved(start, levels[:1].expand(3)))

    plan = run(nodes["H2CacheLoadPlan"], plan_name="own-4.json")
    assert len(plan.strides) == 6 and plan.sigmas[0] == 1 and max(map(len, plan.strides)) == 3
    assert max(abs(a - b) for a, b in zip(plan.sigmas, levels[::4].tolist(), strict=True)) > 0.01  # steps were chosen
    sigmas = run(nodes["H2CachePlanScheduler"], plan=plan)
    with_plan = guider.sample(start, torch.zeros_like(start), run(nodes["H2CachePlanSampler"], plan=plan), sigmas)
    few, x = levels[::4], start
    for sigma, later in pairwise(few):
        x = x + (later - sigma) * curved(x, sigma.expand(3))
    assert len(few) == 7 and (with_plan - drawn).norm() < 0.1 * (x - drawn).norm()


def test_a_plan_is_made_on_flux_mini(flux_mini, nodes, tmp_path):
    """Two images of one prompt are calibrated on. Another prompt ends nearer to its uncached latents than with Euler's
    method and as many calls (measured on eight prompts: 48.8 dB beside 37.7)."""
    call = dict(height=128, width=128, guidance_scale=3.5, max_sequence_length=64, output_type="latent")

    def recorded(prompt, *seeds):
        """(guider, noise, uncached latents) of the pipeline."""
        seen = []
        hook = flux_mini.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        noises = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = flux_mini([prompt] * len(seeds), generator=noises, num_inference_steps=20, **call).images
        hook.remove()

        def transformer(x, timestep):
            return flux_mini.transformer(**{**seen[0], "hidden_states": x, "timestep": timestep})[0]

        return flow_guider(transformer), seen[0]["hidden_states"], latents

    guider, start, uncached = recorded("a red stop sign", 0, 1)
    sigmas = flux_mini.scheduler.sigmas.clone()
    sampler = run(nodes["H2CacheCalibrationSampler"], budget=2.0, plan_name="mini.json")
    drawn = guider.sample(start, torch.zeros_like(start), sampler, sigmas)
    torch.testing.assert_close(drawn, uncached, atol=1e-4, rtol=0)

    guider, start, uncached = recorded('a blue label that says "TEA"', 2, 3)
    plan = run(nodes["H2CacheLoadPlan"], plan_name="mini.json")
    own = (run(nodes["H2CachePlanSampler"], plan=plan), run(nodes["H2CachePlanScheduler"], plan=plan))
    (tmp_path / "h2cache_plans" / "euler.json").write_text(
        as_json(with_sigmas(Plan.euler(10), sigmas[:-1:2].tolist())), encoding="utf-8"
    )
    euler = run(nodes["H2CacheLoadPlan"], plan_name="euler.json")
    few = (run(nodes["H2CachePlanSampler"], plan=euler), run(nodes["H2CachePlanScheduler"], plan=euler))
    missed = [(guider.sample(start, torch.zeros_like(start), *each) - uncached).norm() for each in (own, few)]
    assert len(plan.strides) == len(euler.strides) == 10 and missed[0] < 0.6 * missed[1]


@pytest.mark.parametrize(
    ("sigmas", "budget", "message"),
    [
        ([1.0, 0.5, 0.2], 1.0, "whole run of a flow model"),
        ([14.6, 3.0, 0.0], 1.0, "whole run of a flow model"),
        ([1.0, 1.0, 0.0], 1.0, "whole run of a flow model"),
        ([1.0, 0.5, 0.0], 3.0, "budget = 3"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_the_model_is_called(nodes, sigmas, budget, message):
    sampler = run(nodes["H2CacheCalibrationSampler"], budget=budget, plan_name="own.json")
    guider = flow_guider(lambda x, timestep: pytest.fail("the model was called"))
    with pytest.raises(ValueError, match=message):
        guider.sample(noise(1, 4), torch.zeros(1, 4), sampler, torch.tensor(sigmas))


def test_no_plan_is_overwritten_and_none_is_written_elsewhere(nodes, tmp_path):
    (tmp_path / "h2cache_plans" / "own.json").write_text("kept")
    sampler = run(nodes["H2CacheCalibrationSampler"], budget=1.0, plan_name="own.json")
    guider = flow_guider(lambda x, timestep: pytest.fail("the model was called"))
    with pytest.raises(ValueError, match=r"own\.json is there already"):
        guider.sample(noise(1, 4), torch.zeros(1, 4), sampler, torch.tensor([1.0, 0.0]))
    for name in ("../own.json", "a/b.json", "own", ".json", ""):
        with pytest.raises(ValueError, match="plan_name"):
            run(nodes["H2CacheCalibrationSampler"], budget=1.0, plan_name=name)


def test_calibration_without_h2cache_says_what_to_install(nodes, monkeypatch):
    sampler = run(nodes["H2CacheCalibrationSampler"], budget=1.0, plan_name="own.json")
    monkeypatch.setitem(sys.modules, "h2cache.plans", None)
    with pytest.raises(ModuleNotFoundError, match="pip install h2cache"):
        flow_guider(curved).sample(noise(1, 4), torch.zeros(1, 4), sampler, torch.tensor([1.0, 0.0]))


def test_half_precision_comes_back_as_it_was(package):
    sampler = sys.modules[f"{package.__name__}.plan_sampler"]
    table = sampler.PlanTable.from_json(as_json(PLAIN))
    x, sigmas = noise(2, 4).bfloat16(), torch.tensor(table.sigmas)
    made = sampler.sample_plan(lambda x, sigma: 0.5 * x, x, sigmas, disable=True, plan=table)
    assert made.dtype == torch.bfloat16 and made.isfinite().all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no exported plan"),
        ("[]", "no exported plan"),
        (PLAIN.to_json(), "no exported plan"),
        ('{"sigmas": [1, 0], "strides": []}', "one sigma more"),
        ('{"sigmas": [14.6, 0], "strides": [[-14.6]]}', "at most 1"),
        ('{"sigmas": [1, 0.5], "strides": [[-0.5]]}', "to 0"),
        ('{"sigmas": [1, 1, 0], "strides": [[0], [-1]]}', "must fall"),
        ('{"sigmas": [1, 0], "strides": [[-0.5, -0.5]]}', "1 to 1 numbers"),
        ('{"sigmas": [1, 0], "strides": [[-0.9]]}', "sum to -1"),
        ('{"sigmas": [1, 0], "strides": [[NaN]]}', "sum to -1"),
    ],
)
def test_a_file_that_is_no_exported_plan_is_named(nodes, tmp_path, text, message):
    (tmp_path / "h2cache_plans" / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        run(nodes["H2CacheLoadPlan"], plan_name="a.json")
    assert "a.json" in str(refusal.value)


def test_the_list_of_plans_is_that_of_the_folder(nodes, tmp_path):
    folder, node = tmp_path / "h2cache_plans", nodes["H2CacheLoadPlan"]
    assert node.INPUT_TYPES() == {"required": {"plan_name": ([],)}}
    for name in ("b.json", "a.json", "c.txt"):
        (folder / name).write_text(as_json(EULER))
    (tmp_path / "secret.json").write_text(as_json(EULER))
    assert node.INPUT_TYPES() == {"required": {"plan_name": (["a.json", "b.json"],)}}
    with pytest.raises(ValueError, match="has no plan"):
        run(node, plan_name="../secret.json")
    before = node.IS_CHANGED("a.json")
    (folder / "a.json").write_text(as_json(PLAIN))
    assert node.IS_CHANGED("a.json") != before == node.IS_CHANGED("b.json")


def test_the_folder_works_alone(tmp_path):
    """Copied into `custom_nodes`, in a process that has neither ComfyUI nor h2cache nor diffusers."""
    copy = shutil.copytree(FOLDER, tmp_path / "custom_nodes" / "h2cache.nodes")
    program = (
        "import sys; sys.modules |= dict.fromkeys(['comfy', 'folder_paths', 'h2cache', 'diffusers'])\n"
        f"sys.path.append({str(Path(comfyui.__file__).parent)!r})\n"
        "from comfyui import load_custom_node; from pathlib import Path\n"
        f"package = load_custom_node(Path({str(copy)!r}))\n"
        "print(*package.NODE_CLASS_MAPPINGS)"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(said.stdout.split()) == 4


def test_the_nodes_are_declared_as_comfyui_reads_them(package, nodes):
    assert package.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.keys()
    for node in nodes.values():
        assert set(node.INPUT_TYPES()) == {"required"} and len(node.RETURN_TYPES) == 1
        assert callable(getattr(node, node.FUNCTION)) and node.CATEGORY and node.DESCRIPTION


def test_the_project_file_says_what_the_registry_asks_for():
    """docs.comfy.org/registry/specifications; the publisher's id and address are left to whoever publishes."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert set(project["project"]) >= {"name", "version", "description", "license"}
    assert (FOLDER / project["project"]["license"]["file"]).read_text() == (REPOSITORY / "LICENSE").read_text()
    assert "comfyui" not in project["project"]["name"].lower()
    assert set(project["tool"]["comfy"]) >= {"PublisherId", "DisplayName"}


# Of ComfyUI's own nodes in the example: inputs that are linked and their types, outputs, and how many widgets there are
# (nodes.py and comfy_extras/{nodes_flux,nodes_custom_sampler,nodes_sd3}.py; a seed has a second widget after it).
CORE = {
    "UNETLoader": ({}, ["MODEL"], 2),
    "DualCLIPLoader": ({}, ["CLIP"], 4),
    "VAELoader": ({}, ["VAE"], 1),
    "CLIPTextEncode": ({"clip": "CLIP"}, ["CONDITIONING"], 1),
    "FluxGuidance": ({"conditioning": "CONDITIONING"}, ["CONDITIONING"], 1),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ["GUIDER"], 0),
    "RandomNoise": ({}, ["NOISE"], 2),
    "BasicScheduler": ({"model": "MODEL"}, ["SIGMAS"], 3),
    "EmptySD3LatentImage": ({}, ["LATENT"], 3),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ["LATENT", "LATENT"],
        0,
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"], 0),
    "SaveImage": ({"images": "IMAGE"}, [], 1),
}


def declared(nodes, kind):
    """(linked inputs, outputs, number of widgets) of a node."""
    if kind in CORE:
        return CORE[kind]
    inputs = {name: each[0] for name, each in nodes[kind].INPUT_TYPES()["required"].items()}
    linked = {name: each for name, each in inputs.items() if each == "H2CACHE_PLAN"}
    return linked, list(nodes[kind].RETURN_TYPES), len(inputs) - len(linked)


@pytest.mark.parametrize("name", ["flux_plan", "flux_calibrate"])
def test_the_examples_are_wired_as_their_nodes_are_declared(nodes, name):
    workflow = json.loads((FOLDER / "example_workflows" / f"{name}.json").read_text())
    placed = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(placed) == len(workflow["nodes"]) and len(links) == len(workflow["links"])
    assert workflow["last_node_id"] == max(placed) and workflow["last_link_id"] == max(links)
    ends, starts = {}, {}
    for node in placed.values():
        inputs, outputs, widgets = declared(nodes, node["type"])
        assert {each["name"]: each["type"] for each in node["inputs"]} == inputs, node["type"]
        assert [each["type"] for each in node["outputs"]] == outputs, node["type"]
        assert len(node["widgets_values"]) == widgets, node["type"]
        ends |= {each["link"]: (node["id"], slot, each["type"]) for slot, each in enumerate(node["inputs"])}
        starts |= {link: (node["id"], slot) for slot, each in enumerate(node["outputs"]) for link in each["links"]}
    assert ends.keys() == starts.keys() == links.keys()
    for number, start, start_slot, end, end_slot, kind in links.values():
        assert starts[number] == (start, start_slot) and ends[number] == (end, end_slot, kind)
        assert placed[start]["outputs"][start_slot]["type"] == kind
