"""`h2cache demo` in a real browser: what is turned changes the picture, text stays text, visitors do not meet."""

import inspect
import re
import socket
import threading
from dataclasses import fields
from urllib.parse import urlsplit

import pytest

from h2cache import H2CacheConfig, PlanConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TeaCacheConfig

gradio = pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'h2cache[demo]'")

from h2cache.eval.cli import program  # noqa: E402 - as below
from h2cache.eval.demo import app, studio, sweep_tab  # noqa: E402 - they import gradio
from h2cache.eval.demo.controls import changed, choices, controls, fields_of  # noqa: E402
from h2cache.eval.errors import UserError  # noqa: E402
from h2cache.eval.models.pipelines import find_folder  # noqa: E402

HOSTILE = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 2</script>{{ 7 * 7 }} **bold** & <b>'
STEPS = 8


@pytest.fixture(scope="module")
def opened():
    """The embedded model, ready to draw."""
    return studio.Studio.opened([f"model.num_inference_steps={STEPS}"], threading.Lock())


# The fields of a method


def made(method) -> dict:
    turned, others = fields_of(method)
    return controls(method, [*turned, *others])


def test_every_field_of_a_method_has_a_control_that_its_class_takes():
    for method in (H2CacheConfig(), BlockCacheConfig(), ClusCaConfig(), HiCacheConfig(), TeaCacheConfig()):
        found = made(method)
        left_out = {"batch_decision", "coefficients"}
        assert set(found) == {field.name for field in fields(method)} - left_out
        assert changed(method, {name: control.value for name, control in found.items()}) == method
        for name, control in found.items():
            if isinstance(control, gradio.Slider):
                assert control.minimum < control.maximum
                for end in (control.minimum, control.maximum):
                    changed(method, {name: end})


def test_choices_are_those_of_the_class():
    assert choices(H2CacheConfig(), "forecast") == ["reuse", "taylor", "hermite"]
    assert choices(ClusCaConfig(), "granularity") == ["module"]
    assert fields_of(H2CacheConfig())[0] == ["tau1", "tau2"]


def test_whole_numbers_and_none_are_read():
    method = changed(H2CacheConfig(), {"order": 2.0, "pool1": "", "max_consecutive_hits": " 3 "})
    assert (method.order, method.pool1, method.max_consecutive_hits) == (2, None, 3)
    with pytest.raises(ValueError, match="pool1='many'"):
        changed(H2CacheConfig(), {"pool1": "many"})


# What is drawn


def test_the_studio_has_the_methods_and_plans_of_its_model(opened):
    assert {"h2cache", "balanced", "block_cache", "teacache"} <= set(opened.methods)
    assert {"none", "plan"}.isdisjoint(opened.methods)
    assert "flux-mini-4" in opened.plans


def test_work_is_counted_in_evaluations(opened):
    task = studio.Task("a cat", 0, STEPS)
    whole = opened.draw(task)
    assert whole.evaluations(whole) == whole.calls == STEPS
    never = opened.draw(task, H2CacheConfig(tau1=-1, tau2=-1))
    assert never.evaluations(whole) == pytest.approx(STEPS)
    assert never.picture.tobytes() == whole.picture.tobytes()
    often = opened.draw(task, H2CacheConfig(tau1=9, tau2=9))
    assert often.evaluations(whole) < STEPS / 2
    same, apart = (studio.difference_map(each.picture, whole.picture) for each in (never, often))
    assert len(same.getcolors()) == 1 < len(apart.getcolors())


def test_models_that_are_not_here_are_not_offered(monkeypatch, tmp_path):
    here = {"flux-mini", "hunyuan-mini"} if find_folder("assets/hunyuan-mini", "model_index.json") else {"flux-mini"}
    assert set(app.embedded()) == here
    (tmp_path / "assets" / "hunyuan-mini").mkdir(parents=True)
    (tmp_path / "assets" / "hunyuan-mini" / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert app.embedded() == ["flux-mini", "hunyuan-mini"]


def test_a_refusal_is_a_sentence(opened):
    plan = opened.plans["flux-mini-4"]
    with pytest.raises(UserError, match="50"):
        opened.draw(studio.Task("a cat", 0, STEPS), PlanConfig(plan))
    with pytest.raises(UserError, match="tau1"):
        sweep_tab._numbers("tau1", "0.1, <b>")


# In a browser


@pytest.fixture(scope="module")
def address(opened):
    page = app.serve([opened], "127.0.0.1", None, in_background=True)
    yield page.local_url
    page.close()


@pytest.fixture
def visit(chromium, address):
    """Opens the page as a new visitor; at the end nothing was loaded from elsewhere, and nothing typed ran."""
    pages = []

    def visit():
        page = chromium.new_context(viewport={"width": 1200, "height": 900}).new_page()
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Draw", exact=True).wait_for()
        pages.append(page)
        return page

    yield visit
    for page in pages:
        assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []
        assert page.evaluate("window.pwned") is None
        page.context.close()


def draw(page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()


def images(page) -> list[str]:
    """Where the two pictures of the slider are, the uncached one first, once both are there."""
    shown = page.locator(".pair img")
    shown.nth(1).wait_for(timeout=30_000)
    return [each.get_attribute("src") for each in shown.all()[:2]]


def wait_for_facts(page, words: str) -> None:
    page.locator(".facts", has_text=words).first.wait_for(timeout=30_000)


def wait_until_drawn(page) -> None:
    """The difference and, last of all, the timeline are there."""
    page.locator(".picture:visible img").nth(1).wait_for(timeout=30_000)


def pixels(page, url: str) -> bytes:
    return page.request.get(url).body()


def headline(page) -> str:
    return page.locator(".headline").inner_text()


def turn(page, field: str, value: str) -> None:
    """Moves a field's slider by its number, and waits until the other picture is there."""
    before = [headline(page), images(page)[1]]
    box = page.get_by_label(f"number input for {field}")
    box.fill(value)
    box.press("Tab")
    changed = """([told, source]) => document.querySelector('.headline').innerText !== told
        && document.querySelectorAll('.pair img')[1].getAttribute('src') !== source"""
    page.wait_for_function(changed, arg=before, timeout=30_000)


def test_only_this_machine_can_open_it_unless_told_otherwise(address):
    assert inspect.signature(program.demo).parameters["host"].default == "127.0.0.1"
    port = urlsplit(address).port
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))


@pytest.mark.thorough
def test_a_slider_that_is_moved_changes_the_cached_picture_alone(visit):
    page = visit()
    draw(page)
    wait_until_drawn(page)
    before = [pixels(page, url) for url in images(page)]
    turn(page, "tau2", "0.5")
    after = [pixels(page, url) for url in images(page)]
    assert after[0] == before[0] and after[1] != before[1]
    assert re.search(r"\d+\.\d\d dB", headline(page))


@pytest.mark.thorough
def test_the_cached_picture_comes_first(visit):
    page = visit()
    page.evaluate(
        """() => { window.told = []; new MutationObserver(() => {
        const text = document.querySelector('.facts').innerText;
        if (text && text !== window.told.at(-1)) window.told.push(text); }
        ).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    draw(page)
    wait_for_facts(page, "evaluations of the model")
    told = page.evaluate("window.told")
    first = next(text for text in told if "with the cache" in text)
    assert "likeness" not in first and "likeness" in told[-1]


@pytest.mark.thorough
def test_markup_in_a_prompt_stays_text(visit):
    page = visit()
    page.get_by_label("prompt").fill(HOSTILE)
    draw(page)
    wait_for_facts(page, HOSTILE)
    assert HOSTILE in page.locator(".facts td").first.inner_text()
    page.get_by_role("tab", name="Sweep").click()
    page.get_by_label("tau1, structure").fill("<img src=x onerror='window.pwned = 3'>")
    page.get_by_role("button", name="Sweep", exact=True).click()
    page.get_by_text("it must be numbers").wait_for(timeout=30_000)


@pytest.mark.thorough
def test_two_visitors_at_once_see_their_own_pictures(visit):
    prompts = ("a red octagonal sign", "a yellow square on grey")
    pages = [visit() for _ in prompts]
    for page, prompt in zip(pages, prompts, strict=True):
        page.get_by_label("prompt").fill(prompt)
    for page in pages:
        draw(page)
    for page, prompt in zip(pages, prompts, strict=True):
        wait_for_facts(page, prompt)
        wait_until_drawn(page)
    first, second = ({pixels(page, url) for url in images(page)} for page in pages)
    assert first.isdisjoint(second)
    assert prompts[1] not in pages[0].locator(".facts").first.inner_text()
    turn(pages[1], "tau2", "0.5")  # compared with the uncached picture that the visitor's own session kept
    assert pixels(pages[1], images(pages[1])[0]) in second


@pytest.mark.thorough
def test_a_sweep_fills_its_map_in(visit):
    page = visit()
    page.get_by_role("tab", name="Sweep").click()
    page.get_by_label("tau1, structure").fill("0.05, 0.3")
    page.get_by_label("tau2, detail").fill("0.1")
    page.get_by_role("button", name="Sweep", exact=True).click()
    seen = []
    for done in (1, 2):
        page.get_by_text(f"{done} of 2 pairs").wait_for(timeout=30_000)
        seen.append(page.locator(".picture:visible img").last.get_attribute("src"))
    assert seen[0] != seen[1]


@pytest.mark.thorough
def test_solvers_are_compared_with_all_steps(visit):
    page = visit()
    page.get_by_role("tab", name="Plans and solvers").click()
    for name in page.get_by_role("checkbox").all():
        if name.is_visible():
            name.uncheck()
    page.get_by_label("heun").check()
    page.get_by_role("button", name="Draw all").click()
    page.locator("th:visible", has_text="heun").wait_for(timeout=30_000)
    told = page.locator("table:visible").inner_text()
    assert "∞" in told and "unipc" not in told
