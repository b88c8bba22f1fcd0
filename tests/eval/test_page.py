"""report.html: one file, in a real browser. Sorting, comparing, no network, and no prompt that becomes markup."""

import base64
import math
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from measured import SIZE, grid, picture, results, row
from PIL import Image

from h2cache.eval.errors import UserError
from h2cache.eval.generation.videos import filmstrip, notes_of
from h2cache.eval.models.pipelines import DiffusersModelConfig
from h2cache.eval.report import page
from h2cache.eval.report.figures import Frontier, HeatMap
from h2cache.eval.report.results import BASELINE, Artifact
from h2cache.eval.report.tables import SummaryTable
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.webtable import web_table

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror=\"window.pwned = 2\">{{ 7 * 7 }} ${1} 'a' & <b>"
ENVIRONMENT = {
    "command": f"python -m eval {HOSTILE}",
    "time": "2026-01-02T03:04:05+00:00",
    "commit": "0123abc",
    "packages": {"torch": "2.15.0", HOSTILE: "1"},
    "gpus": [],
    "driver": None,
}
TABLE = Sheet(
    "Summary",
    ("method", "time, s", "CLIP-IQA", "PSNR, dB"),
    (
        ("Baseline", "10.00 (1.00x)", "n/a", "n/a"),
        ("H2-Cache", "2.50 (4.00x)", "n/a", "30.00"),
        ("a | <b>", "1,234.50 (0.01x)", "n/a", "∞"),
        ("TeaCache", "3.00 (3.33x)", "n/a", "−4.5"),
    ),
    ("Times are medians.", HOSTILE),
)


def table(folder: Path) -> Artifact:
    return TABLE.write(pd.DataFrame(TABLE.rows, columns=TABLE.header), folder, "summary", "experiment")


FRAMES = 5
FILMS = {BASELINE: (50.0, 0), "H2-Cache, a": (25.0, 3), "H2-Cache, b": (12.0, 6), "Euler": (12.5, 9)}


def level(prompt: int, setting: str, frame: int) -> int:
    """What every pixel of that frame is."""
    return 40 * frame + 7 * prompt + FILMS[setting][1]


def videos(folder: Path):
    """Two prompts by FILMS: (evaluations, how much brighter than the baseline)."""
    rows = []
    for prompt in range(2):
        for setting, (evaluations, _) in FILMS.items():
            method = setting.partition(",")[0]
            made = row(folder, setting, method, f"film{prompt}", f"film {prompt}", 2.0, evaluations=evaluations)
            film = filmstrip([Image.new("RGB", (32, 16), (level(prompt, setting, k),) * 3) for k in range(FRAMES)])
            film.save(made["image"], pnginfo=notes_of(film))
            rows.append(made)
    size = {"height": 16, "width": 32, "num_inference_steps": 50, "num_frames": FRAMES, "fps": 10}
    model = DiffusersModelConfig(path=".", hub_id=None, dtype="float32", device="cpu", offload="none", **size)
    return results(rows, model_config=model)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page of three experiments: images, hostile in every word that comes from outside, videos."""
    folder = tmp_path_factory.mktemp("results with a space")
    measured = grid(folder)
    figures = [output.make(measured, folder) for output in (HeatMap(), Frontier())]
    hostile = results(
        [
            row(folder, BASELINE, BASELINE, HOSTILE, HOSTILE, 4.0, psnr=math.inf),
            row(folder, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 2.0, psnr=30.0, shift=99),
            row(folder, BASELINE, BASELINE, "b", "a second prompt", 4.0, psnr=math.inf),
            row(folder, HOSTILE, HOSTILE, "b", "a second prompt", 2.0, psnr=31.0, shift=50),
        ],
        title=HOSTILE,
        description=HOSTILE,
        model=HOSTILE,
        machine=HOSTILE,
        unavailable={HOSTILE: HOSTILE},
    )
    drawn = Frontier(name="second", title=HOSTILE).make(hostile, folder)
    target = folder / "report.html"
    shown = [(measured, [table(folder), *figures]), (hostile, [drawn]), (videos(folder), [])]
    page.write(shown, ENVIRONMENT, target)
    return target


# In a browser


@pytest.fixture
def opened(chromium, report):
    """Opens the page; at the end nothing was loaded, nothing failed, nothing ran that is not ours."""
    pages = []

    def open_page(**options):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
        browser_page = context.new_page()
        browser_page.requests, browser_page.complaints = [], []
        browser_page.on("request", lambda request: browser_page.requests.append(request.url))
        browser_page.on("console", lambda message: browser_page.complaints.append(message.text))
        browser_page.on("pageerror", lambda error: browser_page.complaints.append(str(error)))
        browser_page.on("dialog", lambda dialog: browser_page.complaints.append(dialog.message))
        browser_page.goto(report.as_uri())
        pages.append(browser_page)
        return browser_page

    yield open_page
    for each in pages:
        assert each.complaints == []
        assert [url for url in each.requests if not url.startswith(("data:", report.as_uri()))] == []
        assert each.evaluate("window.pwned") is None
        each.context.close()


def column(browser_page, number: int) -> list[str]:
    return browser_page.locator(f"table.sortable tbody td:nth-child({number})").all_text_contents()


def sorting(browser_page) -> list[str]:
    return [each.get_attribute("aria-sort") for each in browser_page.locator("table.sortable th").all()]


def test_a_click_on_a_header_sorts_by_number_and_a_second_one_turns_it_round(opened):
    browser_page = opened()
    times = browser_page.get_by_role("button", name="time, s")
    times.click()
    assert column(browser_page, 2) == ["2.50 (4.00x)", "3.00 (3.33x)", "10.00 (1.00x)", "1,234.50 (0.01x)"]
    assert sorting(browser_page) == ["none", "ascending", "none", "none"]
    times.click()
    assert column(browser_page, 2) == ["1,234.50 (0.01x)", "10.00 (1.00x)", "3.00 (3.33x)", "2.50 (4.00x)"]
    assert sorting(browser_page) == ["none", "descending", "none", "none"]


def test_what_has_no_value_stays_last_both_ways(opened):
    browser_page = opened()
    quality = browser_page.get_by_role("button", name="PSNR, dB")
    quality.click()
    assert column(browser_page, 4) == ["−4.5", "30.00", "∞", "n/a"]
    quality.click()
    assert column(browser_page, 4) == ["∞", "30.00", "−4.5", "n/a"]


def test_words_sort_as_words_and_rows_stay_whole(opened):
    browser_page = opened()
    browser_page.get_by_role("button", name="method").click()
    assert column(browser_page, 1) == ["a | <b>", "Baseline", "H2-Cache", "TeaCache"]
    assert column(browser_page, 2)[2] == "2.50 (4.00x)"


def test_headers_are_reached_and_pressed_from_the_keyboard(opened):
    browser_page = opened()
    browser_page.locator(".scroll").first.focus()
    browser_page.keyboard.press("Tab")
    browser_page.keyboard.press("Tab")
    browser_page.keyboard.press("Enter")
    assert sorting(browser_page) == ["none", "ascending", "none", "none"]
    browser_page.keyboard.press("Space")
    assert sorting(browser_page) == ["none", "descending", "none", "none"]


def shown_at(browser_page, comparison, fraction: float) -> tuple[int, int, int]:
    """Colour of the stage at that fraction of its width, in the rows of the 4x4 pixels that differ."""
    image = Image.open(BytesIO(comparison.locator(".stage").screenshot())).convert("RGB")
    return image.getpixel((int(fraction * image.width), int(10 / SIZE * image.height)))


def brightness(shift: int) -> float:
    """Mean of the pixel (22, 10), which is one of those that differ."""
    return float(np.mean(picture(shift).getpixel((22, 10))))


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "finger"])
def test_the_slider_follows_the_pointer(opened, touch):
    """The pixel at two thirds of the width is the left image's to the left of the slider, else the right one's."""
    browser_page = opened(has_touch=touch)
    comparison = browser_page.locator("#comparison-2")
    comparison.scroll_into_view_if_needed()
    box = comparison.locator(".stage").bounding_box()
    middle = box["y"] + box["height"] / 2

    def go_to(fraction: float) -> None:
        x = box["x"] + fraction * box["width"]
        if touch:
            browser_page.touchscreen.tap(x, middle)
            return
        browser_page.mouse.move(box["x"] + box["width"] / 2, middle)
        browser_page.mouse.down()
        browser_page.mouse.move(x, middle, steps=4)
        browser_page.mouse.up()

    for fraction, shift in ((0.25, 99), (0.6, 99), (0.9, 0)):
        go_to(fraction)
        position = float(comparison.locator(".stage input").input_value())
        assert position == pytest.approx(100 * fraction, abs=1)
        handle = comparison.locator(".handle").bounding_box()
        assert handle["x"] + 1 == pytest.approx(box["x"] + fraction * box["width"], abs=5)
        colour = shown_at(browser_page, comparison, 22.5 / SIZE)
        assert np.mean(colour) == pytest.approx(brightness(shift), abs=12)


def test_the_slider_follows_the_keyboard(opened):
    browser_page = opened()
    comparison = browser_page.locator("#comparison-2")
    slider = comparison.locator(".stage input")
    slider.focus()
    for key, value in (("Home", "0"), ("ArrowRight", "0.5"), ("End", "100"), ("ArrowLeft", "99.5")):
        browser_page.keyboard.press(key)
        assert slider.input_value() == value
        position = comparison.locator(".stage").evaluate(
            "stage => getComputedStyle(stage).getPropertyValue('--position')"
        )
        assert position == f"{value}%"
    assert slider.get_attribute("aria-label")


def test_prompt_and_sides_are_chosen(opened):
    browser_page = opened()
    comparison = browser_page.locator("#comparison-1")
    choices = comparison.locator(".right-choice option").all_text_contents()
    assert choices == [
        BASELINE,
        *(f"H2-Cache, tau1 = {a}, tau2 = {b}" for a, b in ((0.05, 0.1), (0.15, 0.1), (0.15, 0.22))),
    ]
    comparison.locator(".prompt-choice").select_option(index=2)
    comparison.locator(".left-choice").select_option(choices[3])
    comparison.locator(".right-choice").select_option(choices[0])
    assert comparison.locator(".prompt").text_content() == 'a sign that says "2"'
    note = "PSNR 32.0 dB, SSIM 0.990, blocks computed 25 %, denoising 3.00 s"
    assert comparison.locator(".left-note").text_content() == f"{choices[3]}: {note}"
    for side, shift in (("left", 40), ("right", 0)):
        source = comparison.locator(f"img.{side}").get_attribute("src")
        shown = Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")
        assert np.mean(shown.getpixel((22, 10))) == pytest.approx(brightness(shift), abs=12)


def films(browser_page) -> list[int | None]:
    """The level of gray that every method's canvas shows, each of one colour; None for a hidden one."""
    return browser_page.locator("#films-3").evaluate(
        """films => [...films.querySelectorAll('canvas')].map(canvas => {
        if (canvas.hidden) return null;
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        const [first] = data;
        if (data.some((value, k) => value !== (k % 4 === 3 ? 255 : first))) throw new Error('not of one colour');
        return first; })"""
    )


def wait_for_films(browser_page, prompt: int, frame: int, settings) -> None:
    """Wait until the films show that frame, pixel for pixel."""
    wanted = [level(prompt, setting, frame) for setting in settings]
    browser_page.wait_for_timeout(50)
    for _ in range(40):
        if films(browser_page) == wanted:
            return
        browser_page.wait_for_timeout(50)
    assert films(browser_page) == wanted


QUARTER = (BASELINE, "H2-Cache, b", "Euler")  # of the baseline's 50 evaluations, and nearest to that


def test_videos_show_one_frame_of_every_method(opened):
    browser_page = opened()
    player = browser_page.locator("#films-3")
    wait_for_films(browser_page, 0, 0, QUARTER)
    assert player.locator(".frame-number").text_content() == "frame 1 of 5"
    player.locator(".frame").fill("3")
    wait_for_films(browser_page, 0, 3, QUARTER)
    player.locator(".prompt-choice").select_option(index=1)
    wait_for_films(browser_page, 1, 3, QUARTER)
    assert player.locator(".prompt").text_content() == "film 1"
    player.locator(".work").select_option("a half of the baseline's")
    wait_for_films(browser_page, 1, 3, (BASELINE, "H2-Cache, a", "Euler"))
    player.locator(".film select").nth(1).select_option("H2-Cache, b")
    wait_for_films(browser_page, 1, 3, QUARTER)
    assert "pixel for pixel" in player.inner_text()


def test_videos_show_what_differs(opened):
    browser_page = opened()
    wait_for_films(browser_page, 0, 0, QUARTER)
    difference = browser_page.get_by_label("Difference from Baseline")
    difference.check()
    browser_page.locator("#films-3 .frame").fill("2")
    base = level(0, BASELINE, 2)
    assert films(browser_page) == [base, *(4 * (level(0, name, 2) - base) for name in QUARTER[1:])]
    difference.uncheck()
    wait_for_films(browser_page, 0, 2, QUARTER)


def test_videos_follow_the_keyboard(opened):
    browser_page = opened()
    player = browser_page.locator("#films-3")
    wait_for_films(browser_page, 0, 0, QUARTER)
    player.focus()
    for key, frame in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0), ("ArrowLeft", 4)):
        browser_page.keyboard.press(key)
        wait_for_films(browser_page, 0, frame, QUARTER)
    play = player.locator(".play")
    browser_page.keyboard.press("Space")
    assert play.text_content() == "Pause"
    browser_page.keyboard.press("ArrowRight")
    assert play.text_content() == "Play", "a step stops it"
    play.focus()
    browser_page.keyboard.press("Space")
    assert play.text_content() == "Pause", "the button takes the key itself, once"
    player.locator(".difference").focus()
    browser_page.keyboard.press("Space")
    assert player.locator(".difference").is_checked() and play.text_content() == "Pause"


def test_videos_play_in_step_at_their_speed(opened):
    """All films are at the same frame whenever one looks, every frame comes, and the last is followed by the first."""
    browser_page = opened()
    wait_for_films(browser_page, 0, 0, QUARTER)
    player = browser_page.locator("#films-3")
    seen = {}
    for speed in ("½", "2"):
        player.locator(".speed").select_option(speed)
        seen[speed] = player.evaluate(
            """async films => {
            const canvases = [...films.querySelectorAll('canvas')];
            const levels = () => canvases.map(canvas => canvas.getContext('2d').getImageData(0, 0, 1, 1).data[0]);
            films.querySelector('.play').click();
            const seen = [], until = performance.now() + 1100;
            while (performance.now() < until) {
                await new Promise(requestAnimationFrame);
                if (String(seen.at(-1)) !== String(levels())) seen.push(levels());
            }
            films.querySelector('.play').click();
            return seen; }"""
        )
    whole = [[level(0, name, frame) for name in QUARTER] for frame in range(FRAMES)]
    assert all(each in whole for each in seen["½"] + seen["2"])
    assert 5 <= len(seen["½"]) <= 8  # 10 frames a second at speed 1
    assert len(seen["2"]) > 1.5 * len(seen["½"])
    assert all(frame in seen["2"] for frame in whole)


def test_what_comes_from_outside_stays_text(opened):
    browser_page = opened()
    assert browser_page.locator("img[src=x], section b").count() == 0
    assert browser_page.locator("script").count() == 2
    assert browser_page.locator("#experiment-2 h2").text_content() == HOSTILE
    assert browser_page.locator("#experiment-2 .description").text_content() == HOSTILE
    assert browser_page.locator("#comparison-2 .prompt").text_content() == HOSTILE
    assert HOSTILE in browser_page.locator("#comparison-2 .right-note").text_content()
    assert browser_page.locator("#figure-2-1 img").get_attribute("alt").startswith(HOSTILE)
    assert HOSTILE in browser_page.locator("header code").last.text_content()
    assert browser_page.locator("#environment th").last.text_content() == f"packages.{HOSTILE}"


def test_the_policy_stops_what_slips_through(opened):
    """Should a prompt ever become markup, its script does not run and its image is not loaded."""
    browser_page = opened()
    failures = []
    browser_page.on("requestfailed", lambda request: failures.append((request.url, request.failure)))
    browser_page.evaluate(
        """() => { const script = document.createElement('script'); script.textContent = 'window.pwned = 3';
        document.body.append(script); document.body.insertAdjacentHTML('beforeend',
        '<img src="https://example.invalid/x.png" onerror="window.pwned = 4">'); }"""
    )
    browser_page.wait_for_timeout(100)
    assert browser_page.evaluate("window.pwned") is None
    assert failures == [("https://example.invalid/x.png", "csp")], "refused before it left the browser"
    assert browser_page.complaints and all("Content Security Policy" in text for text in browser_page.complaints)
    browser_page.complaints.clear()
    browser_page.requests.clear()


def test_unavailable_metrics_say_why(opened):
    told = opened().locator("#experiment-1 .unavailable").inner_text()
    assert "clipiqa" in told and "its weights cannot be fetched" in told


def test_a_reason_is_there_once_for_all_metrics_and_tables(tmp_path):
    reason = "there is no network"
    measured = grid(tmp_path)
    frame = measured.frame.assign(lpips=math.nan)
    lacking = dict.fromkeys(["clipiqa", "lpips"], reason)
    measured = replace(measured, frame=frame, metrics=("psnr", *lacking), unavailable=lacking)
    made = SummaryTable().make(measured, tmp_path)
    page.write([(measured, [made])], ENVIRONMENT, tmp_path / "report.html")
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert written.count(reason) == 1 and "<strong>clipiqa, lpips</strong>" in written
    assert all(reason in file.read_text(encoding="utf-8") for file in made.files if file.suffix in (".md", ".tex"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(opened, scheme):
    """Text stands out from the paper at 7:1 and more in both."""
    browser_page = opened(color_scheme=scheme)
    colours = browser_page.evaluate(
        "() => { const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]; }"
    )
    paper, ink = (_luminance(colour) for colour in colours)
    assert (paper > 0.5) == (scheme == "light")
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7


def _luminance(colour: str) -> float:
    channels = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("width", [360, 400, 1200])
def test_the_page_never_scrolls_sideways(opened, width):
    browser_page = opened(viewport={"width": width, "height": 800})
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_entry_of_the_contents_leads_somewhere(opened):
    browser_page = opened()
    targets = [link.get_attribute("href") for link in browser_page.locator("nav a").all()]
    # Three experiments, a table, three figures, two comparisons, two ballots, the videos, the environment.
    assert len(targets) == 13
    assert all(browser_page.locator(f"[id='{target[1:]}']").count() == 1 for target in targets)


def test_print_shows_tables_and_figures_and_hides_what_is_pressed(opened):
    browser_page = opened(color_scheme="dark")
    browser_page.emulate_media(media="print")
    assert browser_page.locator("#figure-1-1 img").is_visible() and browser_page.locator("table.sortable").is_visible()
    assert (
        not browser_page.locator("#comparison-1, #blind-1").first.is_visible()
        and not browser_page.locator("nav").is_visible()
    )
    assert browser_page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


# The file


def test_the_file_refers_to_nothing_but_its_own_folder(report):
    """Whatever would be loaded is inlined; whatever is linked is a file beside the page."""
    text = report.read_text(encoding="utf-8")
    assert {uri.partition(",")[0] for uri in re.findall(r'<img[^>]* src="([^"]*)"', text)} == {"data:image/png;base64"}
    links = [unquote(link) for link in re.findall(r'href="([^"#][^"]*)"', text) if not link.startswith("data:")]
    assert len(links) == 3 + 3 * 2
    assert all((report.parent / link).is_file() for link in links)
    assert not re.search(r"url\(|@import|https?://", re.sub(r'<script type="application/json".*', "", text))


def test_the_page_is_written_whole_or_not_at_all(report, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("the old one")

    def full_disk(self, text, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        page.write([(grid(tmp_path), [])], {}, target)
    assert target.read_text() == "the old one"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_without_results_there_is_no_page(tmp_path):
    with pytest.raises(UserError, match="there are no results"):
        page.write([], {}, tmp_path / "report.html")


def test_images_beyond_the_budget_are_left_out_and_the_page_says_so(tmp_path):
    measured = grid(tmp_path)
    page.write([(measured, [])], {}, tmp_path / "report.html", image_budget=1)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The first 1 of 3 prompts" in text
    page.write([(measured, [])], {}, tmp_path / "report.html")
    assert "of 3 prompts" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_image_of_two_experiments_is_there_once(tmp_path):
    measured = grid(tmp_path)
    page.write([(measured, []), (measured, [])], {}, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/webp") == len(measured.frame)


def test_large_videos_are_compressed_and_the_page_says_so(tmp_path):
    measured = videos(tmp_path)
    for path in measured.frame["image"]:
        film = filmstrip([Image.new("RGB", (600, 400))] * FRAMES)
        film.save(path, pnginfo=notes_of(film))
    page.write([(measured, [])], {}, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "pixel for pixel" not in text and "Frames are compressed" in text
    source = re.search(r'"data:image/webp;base64,([^"]+)"', text)[1]
    assert Image.open(BytesIO(base64.b64decode(source))).size == (3 * 256, 2 * 171)


def test_missing_images_are_not_compared(tmp_path):
    measured = grid(tmp_path)
    for path in measured.frame["image"][1:]:
        path.unlink()
    page.write([(measured, [])], {}, tmp_path / "report.html")
    assert "comparison-1" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_large_figure_is_compressed_and_the_page_says_so(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    artifact = Artifact("large", "Large", "It is large.", (tmp_path / "large.png",))
    page.write([(grid(tmp_path), [artifact])], {}, tmp_path / "report.html", image_budget=1)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    source = re.search(r'src="data:image/webp;base64,([^"]+)"', text)[1]
    assert Image.open(BytesIO(base64.b64decode(source))).size == (1600, 400)
    assert "Compressed for this page." in text


# Tables


def test_a_table_is_shown_as_it_is_printed():
    found = web_table(TABLE)
    assert found.columns == ("method", "time, s", "CLIP-IQA", "PSNR, dB")
    assert found.numeric == (False, True, True, True)
    assert [line[0].text for line in found.rows] == ["Baseline", "H2-Cache", "a | <b>", "TeaCache"]
    assert [line[1].value for line in found.rows] == [10.0, 2.5, 1234.5, 3.0]
    assert [line[3].value for line in found.rows] == [None, 30.0, math.inf, -4.5]
    assert web_table(Sheet("", ("a",), (("1e-3",), ("",)), ())).rows[0][0].value == 0.001
