"""Figures: what they show is what was measured, and it can be read."""

import ast
import math
from itertools import combinations

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from measured import DETAIL, STRUCTURE, THRESHOLDS, grid, picture, results, rivals, row, trace
from PIL import Image
from repository import REPOSITORY
from thorough import product

from h2cache.eval.errors import UserError
from h2cache.eval.report.figures import Banner, FilmStrips, Frontier, HeatMap, MetricTrace, Rows, Separation
from h2cache.eval.report.figures.images import difference
from h2cache.eval.report.figures.measures import measure
from h2cache.eval.report.figures.rows import most_different
from h2cache.eval.report.figures.style import LOOKS, looks_of, styled, text_width, wrap
from h2cache.eval.report.figures.traces import timeline
from h2cache.eval.report.results import BASELINE
from h2cache.eval.report.tables import SummaryTable

LONG = (
    "A method of a very long name, with many_fields_in_one_word_that_does_not_break_anywhere = 0.123456789, order = 2"
)
FIGURES = [
    pytest.param(MetricTrace(), id="traces"),
    pytest.param(MetricTrace(count=2), id="traces-of-two"),
    pytest.param(
        HeatMap(values=("denoising_speedup", "psnr", "hit_rate.detail"), marked={"tau1": 0.15, "tau2": 0.22}), id="map"
    ),
    pytest.param(Frontier(intervals=True), id="frontier"),
    pytest.param(Frontier(gain="computed_fraction", quality="ssim"), id="frontier-of-blocks"),
    pytest.param(Frontier(gain="evaluations"), id="frontier-of-evaluations"),
    pytest.param(Separation(count=1), id="separation"),
    pytest.param(Rows(count=1), id="rows"),
    pytest.param(FilmStrips(count=1, metrics=("psnr",)), id="film-strips"),
]


@pytest.fixture
def measured(tmp_path):
    return grid(tmp_path)


def drawn(output, measured) -> Figure:
    with styled():
        figure = output.draw(measured).figure
        FigureCanvasAgg(figure).draw()
    return figure


def by_gid(figure: Figure, gid: str) -> list:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


# Files


# Writing both files takes a second, so that another figure of a kind is thorough.
@product("output", FIGURES, kept=lambda figure: figure not in ("traces-of-two", "frontier-of-blocks"))
def test_a_figure_is_a_png_at_200_dpi_and_a_pdf_with_text(output, measured, tmp_path):
    artifact = output.make(measured, tmp_path)
    png, pdf = artifact.files
    assert (png.suffix, pdf.suffix) == (".png", ".pdf")
    with Image.open(png) as image:
        assert round(image.info["dpi"][0]) == 200
        assert image.width in (700, 1432)  # one or two columns of a journal
        assert len(np.unique(np.asarray(image.convert("L")))) > 20, "blank"
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and b"/FontFile2" in content, "text is outlines, or there is none"
    assert artifact.caption and artifact.title
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("output", [Frontier(), Rows(count=1)])
def test_the_same_results_make_the_same_bytes(output, measured, tmp_path):
    first = [path.read_bytes() for path in output.make(measured, tmp_path).files]
    assert [path.read_bytes() for path in output.make(measured, tmp_path).files] == first


def test_a_figure_that_cannot_be_written_leaves_the_old_one(measured, tmp_path, monkeypatch):
    old = [path.read_bytes() for path in Frontier().make(measured, tmp_path).files]
    save = Figure.savefig

    def full_disk(self, path, **options):
        save(self, path, **options)
        if path.suffix == ".pdf":
            raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space"):
        Frontier(quality="ssim").make(measured, tmp_path)
    assert [(tmp_path / f"frontier{suffix}").read_bytes() for suffix in (".png", ".pdf")] == old
    assert list(tmp_path.glob(".*")) == []


def test_the_users_own_matplotlib_is_left_alone(measured, tmp_path):
    before = dict(matplotlib.rcParams)
    Frontier().make(measured, tmp_path)
    assert dict(matplotlib.rcParams) == before
    for path in (REPOSITORY / "eval" / "figures").glob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.name for node in imports for alias in node.names} | {getattr(n, "module", "") for n in imports}
        assert not any("pyplot" in str(name) for name in names), path.name


# Legibility


def shown_texts(figure: Figure) -> list[Text]:
    """Every text that the reader sees; of ticks those within the axis."""
    for_ticks = {}
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                inside = ax.axison and low <= tick.get_loc() <= high
                for label in (tick.label1, tick.label2):
                    for_ticks[label] = inside and label.get_visible()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [text for text in texts if for_ticks.get(text, True)]


def assert_legible(figure: Figure) -> None:
    """No text overlaps another, none leaves the sheet, and none is smaller than 7 pt."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown_texts(figure)]
    assert len(boxes) > 3
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text!r} is cut off"
    for (text, box), (other, second) in combinations(boxes, 2):
        across = min(box.x1, second.x1) - max(box.x0, second.x0)
        along = min(box.y1, second.y1) - max(box.y0, second.y0)
        assert across <= 1 or along <= 1, f"{text!r} over {other!r}"
    assert min(text.get_size() for text in shown_texts(figure)) >= 7


@pytest.mark.parametrize("output", FIGURES)
def test_no_text_overlaps_or_is_cut_off(output, measured):
    assert_legible(drawn(output, measured))


@pytest.mark.parametrize("output", FIGURES)
def test_long_names_and_prompts_wrap(output, measured):
    frame = measured.frame.replace({"setting": {"H2-Cache, tau1 = 0.15, tau2 = 0.22": LONG}})
    frame["prompt"] = 'a sign of $100 that says "' + "very long, and so on; " * 20 + '"'
    assert_legible(drawn(output, results(frame.to_dict("records"))))


def test_a_dollar_sign_is_a_dollar_sign(measured):
    frame = measured.frame.assign(prompt="for $5 or $x_1$")
    figure = drawn(Rows(), results(frame.to_dict("records")))
    (text, *_) = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert text.get_text() == "for $5 or $x_1$" and not text.get_parse_math()


def test_lines_are_as_wide_as_they_may_be_and_keep_values_together():
    text = "Block Cache, threshold = 0.12 and a_word_that_is_wider_than_the_line"
    lines = wrap(text, 1.0)
    assert all(text_width(line) <= 1.0 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert "threshold = 0.12".replace(" ", "\N{NO-BREAK SPACE}") in lines


# Methods


def test_every_method_has_its_own_colour_and_marker():
    """Colour for the screen, marker for a print in grey; also for methods that are not ours."""
    methods = [*LOOKS, *(f"method {number}" for number in range(20))]
    looks = looks_of(pd.Series(methods))
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(methods)
    ours = [LOOKS[method] for method in LOOKS]
    assert len({look.colour for look in ours}) == len({look.marker for look in ours}) == len(ours)
    assert len({str(look.dashes) for look in ours if look is not LOOKS["H2-Cache"]}) == len(ours) - 1
    assert looks_of(pd.Series(["TeaCache", "Mine"]))["TeaCache"] == looks["TeaCache"]


# Traces


def points_of(ax, decision: str) -> list[tuple[float, float]]:
    return [tuple(xy) for artist in ax.collections if artist.get_gid() == decision for xy in artist.get_offsets()]


@pytest.mark.parametrize(("panel", "stage", "rows"), [(0, "structure", STRUCTURE), (1, "detail", DETAIL)])
def test_decisions_are_the_traces_own(measured, panel, stage, rows):
    """Also where a threshold would say otherwise: step 4 computed without having measured."""
    ax = drawn(MetricTrace(), measured).axes[panel]
    for decision in ("compute", "hit", "forced", "warmup"):
        expected = {step: diff for step, (diff, what) in enumerate(rows) if what == decision}
        points = dict(points_of(ax, decision))
        assert list(points) == list(expected)
        for step, y in points.items():
            assert y < 0 if math.isnan(expected[step]) else y == pytest.approx(expected[step])
    (metric,) = (line for line in ax.lines if line.get_gid() == "metric")
    np.testing.assert_allclose(metric.get_ydata(), [diff for diff, _ in rows])
    (threshold,) = (line for line in ax.lines if line.get_gid() == "threshold")
    assert set(threshold.get_ydata()) == {THRESHOLDS[stage]}


def test_settings_are_stacked_over_one_axis_of_steps(measured):
    axes = drawn(MetricTrace(settings=("H2-Cache, tau1 = 0.15, tau2 = 0.22", BASELINE)), measured).axes
    assert [ax.get_ylabel() for ax in axes] == ["structure", "detail"], "the baseline decides nothing"
    axes = drawn(MetricTrace(), measured).axes
    assert len(axes) == 6
    assert len({ax.get_xlim() for ax in axes}) == 1


def test_prompts_of_different_size_share_their_scale(measured, tmp_path):
    """The second prompt's metric is a tenth: both columns keep the scale of the first."""
    small = trace()
    small["diff"] /= 10
    path = measured.frame.loc[measured.frame["prompt_id"] == "sign1", "trace"].dropna().iloc[0]
    small.to_csv(path, index=False)
    first, second = drawn(MetricTrace(count=2), measured).axes[:2]
    assert first.get_ylim() == second.get_ylim()
    assert max(y for _, y in points_of(first, "compute")) < first.get_ylim()[1]


def test_schedules_that_measure_nothing_have_no_trace(tmp_path):
    silent = trace().assign(diff=math.nan, threshold=math.nan)
    rows = [row(tmp_path, "HiCache", "HiCache", "sign0", "a sign", 1.0, trace=silent)]
    assert MetricTrace().make(results(rows), tmp_path) is None


def test_a_timeline_shows_one_run_also_of_a_method_that_measures_nothing():
    run = trace()
    silent = run.assign(diff=np.nan, threshold=np.nan)
    with styled():
        shown, blank = (timeline(pd.concat([each, each.assign(run=1)])) for each in (run, silent))
    for figure in (shown, blank):
        assert [ax.get_ylabel() for ax in figure.axes] == list(run["stage"].unique())
        marks = [part for part in figure.axes[0].collections if part.get_gid() in set(run["decision"])]
        assert sum(len(part.get_offsets()) for part in marks) == (run["stage"] == run["stage"][0]).sum()
    assert len(shown.axes[0].get_yticks()) and not len(blank.axes[0].get_yticks())


def test_only_one_run_of_a_trace_is_drawn(tmp_path):
    """A trace with two contexts, as of guidance: the steps of the first."""
    both = pd.concat([trace(), trace().assign(context="uncond", diff=9.0)])
    rows = [row(tmp_path, "H2-Cache", "H2-Cache", "sign0", "a sign", 1.0, trace=both)]
    ax = drawn(MetricTrace(), results(rows)).axes[0]
    assert [step for step, _ in points_of(ax, "hit")] == [1, 3, 5]
    assert ax.get_ylim()[1] < 1


# Heat maps


def cells(ax) -> dict[tuple[int, int], str]:
    return {tuple(map(int, text.get_gid().split()[1:])): text.get_text() for text in ax.texts}


def test_cells_hold_the_speedup_and_the_mean_quality(measured):
    """The grid's corner (0.05, 0.22) was not measured. Rows are tau1, columns tau2, in order of size."""
    speedup, psnr = drawn(HeatMap(), measured).axes
    assert cells(speedup) == {(0, 0): "2.00", (0, 1): "n/a", (1, 0): "3.00", (1, 1): "4.00"}
    assert cells(psnr) == {(0, 0): "41.0", (0, 1): "n/a", (1, 0): "36.0", (1, 1): "31.0"}
    assert [label.get_text() for label in psnr.get_xticklabels()] == ["0.1", "0.22"]
    assert [label.get_text() for label in psnr.get_yticklabels()] == ["0.05", "0.15"]
    assert (psnr.get_xlabel(), psnr.get_ylabel()) == ("τ₂", "τ₁")


def test_where_chooses_among_settings_of_one_cell(measured):
    frame = measured.frame.assign(fields=[fields and fields | {"pool1": 16} for fields in measured.frame["fields"]])
    output = HeatMap(rows="tau2", columns="pool1", values=("psnr",), where={"tau1": 0.15})
    assert cells(drawn(output, results(frame.to_dict("records"))).axes[0]) == {(0, 0): "36.0", (1, 0): "31.0"}


def test_the_marked_setting_is_framed(measured):
    figure = drawn(HeatMap(marked={"tau1": 0.15, "tau2": 0.1}), measured)
    frame = next(patch for patch in figure.axes[0].patches if patch.get_gid() == "marked")
    x, y = frame.get_center()
    assert (round(x), round(y)) == (0, 1)
    elsewhere = drawn(HeatMap(marked={"tau1": 0.5, "tau2": 0.1}), measured)
    assert not [patch for patch in elsewhere.axes[0].patches if patch.get_gid() == "marked"]


def test_the_best_pairs_at_the_marked_speed_are_said(measured):
    """3x is the marked pair's speed; 2x at 40 dB is slower. SSIM is the same everywhere: the first pair has it."""
    marked = {"tau1": 0.15, "tau2": 0.1}
    with styled():
        caption = HeatMap(values=("speedup", "psnr", "ssim"), marked=marked).draw(measured).caption
        unmarked = HeatMap(values=("psnr",)).draw(measured).caption
    told = "Best among the pairs that denoise at least as fast as τ₁ = 0.15, τ₂ = 0.1: "
    assert told + "PSNR 36.0 at τ₁ = 0.15, τ₂ = 0.1; SSIM 0.990 at τ₁ = 0.15, τ₂ = 0.1." in caption
    assert "Best" not in unmarked
    measured.frame.loc[measured.frame["setting"].str.contains("0.22"), "psnr"] = 50.0
    with styled():
        better = HeatMap(values=("psnr",), marked=marked).draw(measured).caption
    assert "PSNR 50.0 at τ₁ = 0.15, τ₂ = 0.22." in better


def test_what_could_not_be_measured_is_said(measured):
    with styled():
        some = HeatMap(values=("clipiqa", "ssim")).draw(measured)
    assert len(some.figure.axes) == 1
    assert "CLIP-IQA: n/a (its weights cannot be fetched)" in some.caption


@pytest.mark.parametrize(
    "output", [HeatMap(values=("clipiqa",)), HeatMap(rows="interval", columns="order"), Frontier(quality="clipiqa")]
)
def test_nothing_measured_makes_no_figure(output, measured, tmp_path):
    assert output.make(measured, tmp_path / "none") is None


def test_an_infinite_quality_is_a_cell_of_its_own(measured):
    measured.frame.loc[measured.frame["setting"].str.contains("0.05"), "psnr"] = math.inf
    assert cells(drawn(HeatMap(values=("psnr",)), measured).axes[0])[0, 0] == "∞"


# Frontiers


def test_lines_join_what_is_not_beaten(tmp_path):
    measured = rivals(tmp_path)
    figure = drawn(Frontier(), measured)
    own = {line.get_gid(): [round(x, 2) for x in line.get_xdata()] for line in figure.axes[0].lines}
    assert own["line H2-Cache"] == [2.0, 3.0], "2.5x at 32 dB is beaten by 3x at 33 dB"
    assert own["line TeaCache"] == [2.0, 3.5]
    assert own["pareto"] == [2.0, 4.0], "3.5x at 36 dB is beaten by 4x at 37 dB"
    colours = {line.get_gid(): to_hex(line.get_color()) for line in figure.axes[0].lines}
    assert colours["line TeaCache"] == LOOKS["TeaCache"].colour
    (beaten,) = by_gid(figure, "point H2-Cache, 2")
    (unbeaten,) = by_gid(figure, "point H2-Cache, 1")
    assert to_hex(beaten.get_facecolor()[0]) == "#ffffff" != to_hex(unbeaten.get_facecolor()[0])


def test_fewer_blocks_are_better(tmp_path):
    """The same settings by work: what is right in speedup is left in blocks."""
    figure = drawn(Frontier(gain="computed_fraction", quality="ssim"), rivals(tmp_path))
    own = {line.get_gid(): list(line.get_xdata()) for line in figure.axes[0].lines}
    np.testing.assert_allclose(own["pareto"], [1 / 4, 1 / 2])
    assert own["line Mine"] == [pytest.approx(1 / 1.5)]


@pytest.mark.parametrize(("low", "high"), [(0.9, 7), (1.4, 4.5), (2.1, 2.9), (0.4, 40)])
def test_ticks_of_speedups_do_not_touch(tmp_path, low, high):
    points = [(low, 40.0), (high, 30.0)]
    rows = [row(tmp_path, BASELINE, BASELINE, "p", "a sign", 8.0, psnr=math.inf)]
    rows += [row(tmp_path, f"TeaCache, {x}", "TeaCache", "p", "a sign", 8 / x, psnr=y) for x, y in points]
    figure = drawn(Frontier(), results(rows))
    assert_legible(figure)
    assert len([text for text in shown_texts(figure) if "×" in text.get_text()]) >= 1


def test_the_baseline_is_a_level_where_it_has_a_quality(tmp_path):
    measured = rivals(tmp_path)
    assert by_gid(drawn(Frontier(), measured), "baseline") == [], "its PSNR against itself is infinite"
    (level,) = by_gid(drawn(Frontier(quality="ssim"), measured), "baseline")
    assert list(level.get_ydata()) == [1.0, 1.0]


def test_settings_without_a_finite_value_are_named(measured):
    measured.frame.loc[measured.frame["setting"].str.contains("0.05"), "psnr"] = math.inf
    with styled():
        assert (
            "Not drawn, having no finite value: H2-Cache, tau1 = 0.05, tau2 = 0.1." in Frontier().draw(measured).caption
        )


def test_figures_show_the_tables_numbers(tmp_path):
    """Means and 95 % intervals, and the ratio of mean times: what the experiment's CSV has."""
    measured = rivals(tmp_path)
    SummaryTable().make(measured, tmp_path)
    csv = pd.read_csv(tmp_path / "summary.csv").set_index("setting").loc["TeaCache, 0"]
    rows = measured.frame[measured.frame["setting"] == "TeaCache, 0"]
    psnr, speedup = (measure(measured, name).of(rows) for name in ("psnr", "denoising_speedup"))
    expected = csv[["psnr_mean", "psnr_ci95_low", "psnr_ci95_high"]]
    assert (psnr.value, psnr.low, psnr.high) == pytest.approx(tuple(expected)) and psnr.low < psnr.high
    names = ("denoising_seconds_speedup", "denoising_seconds_speedup_ci95_low", "denoising_seconds_speedup_ci95_high")
    assert (speedup.value, speedup.low, speedup.high) == pytest.approx(tuple(csv[list(names)]))
    figure = drawn(Frontier(intervals=True), measured)
    bars = by_gid(figure, "interval TeaCache, 0")
    assert [psnr.low, psnr.high] in [list(bar.get_ydata()) for bar in bars]
    assert not by_gid(drawn(Frontier(), measured), "interval TeaCache, 0")


def test_identical_images_are_not_in_a_mean(measured):
    """An infinite PSNR is one of three: the mean is of the other two."""
    rows = measured.frame[measured.frame["setting"].str.contains("0.05")]
    measured.frame.loc[rows.index[0], "psnr"] = math.inf
    assert measure(measured, "psnr").of(rows).value == pytest.approx((41 + 42) / 2)


# Images


def test_differences_are_amplified_and_stand_under_their_image(measured):
    """The 4x4 pixels that differ by 40 of 255, four times: 160 of 255 of the colour scale; elsewhere its bottom."""
    figure = drawn(Separation(settings=("H2-Cache, tau1 = 0.15, tau2 = 0.22",), count=1), measured)
    changed = difference(picture(40), picture(0))
    assert changed.max() == pytest.approx(40 / 255)
    maps = [ax for ax in figure.axes if ax.images and ax.images[0].get_array().shape[:2] == changed.shape]
    (shown,) = (ax.images[0].get_array() for ax in maps)
    expected = matplotlib.colormaps["magma"](4 * changed)[:, :, :3]
    np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert not np.allclose(shown[10, 22], shown[0, 0])


def test_the_crop_is_where_the_images_differ_most():
    images = [picture(40, at=(20, 8)), picture(40, at=(22, 8)), picture(60, at=(2, 26))]
    left, top, right, bottom = most_different(picture(0), images, 0.25)
    assert (right - left, bottom - top) == (8, 8)
    assert left <= 20 and right >= 26 and top <= 8 and bottom >= 12
    assert most_different(picture(0), [picture(0)], 0.5) == (8, 8, 24, 24), "nothing differs: the middle"
    assert most_different(picture(0), [picture(9)], 1.0) == (0, 0, 32, 32)


def test_all_images_of_a_row_show_the_same_crop(measured):
    figure = drawn(Rows(count=2), measured)
    outlines = by_gid(figure, "crop")
    assert len(outlines) == 2 * 4
    assert len({outline.get_bbox().bounds for outline in outlines}) == 1


def test_a_banner_is_images_alone_in_two_rows(tmp_path):
    """Six prompts; the one that the setting has no image of is left out."""
    rows = [row(tmp_path, BASELINE, BASELINE, f"sign{n}", "a sign", 1.0) for n in range(7)]
    rows += [row(tmp_path, "A", "A", f"sign{n}", "a sign", 1.0, shift=60) for n in range(7) if n != 2]
    figure = drawn(Banner(setting="A"), results(rows))
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 2 * 5 and figure.findobj(Text) and not any(t.get_text() for t in figure.findobj(Text))
    assert all(np.array_equal(shown[0], each) for each in shown[1:5]) and not np.array_equal(shown[0], shown[5])
    tops = [round(axes.get_position().y1, 6) for axes in figure.axes]
    assert len(set(tops[:5])) == len(set(tops[5:])) == 1 and tops[0] > tops[5]
    with pytest.raises(UserError, match="has no setting 'B' to draw"):
        drawn(Banner(setting="B"), results(rows))


def test_many_settings_stand_in_bands_of_readable_columns(tmp_path):
    """Seven settings: two bands with a baseline each, and the crop of both is where the last of them differs most."""
    rows = [row(tmp_path, BASELINE, BASELINE, "sign0", "a sign", 1.0)]
    rows += [row(tmp_path, f"method {n}", f"method {n}", "sign0", "a sign", 1.0, shift=9 * n) for n in range(6)]
    rows.append(row(tmp_path, "method 6", "method 6", "sign0", "a sign", 1.0, shift=130, at=(2, 26)))
    figure = drawn(Rows(), results(rows))
    headings = [text for text in figure.texts if text.get_weight() == "bold"]
    assert [text.get_text() for text in headings].count(BASELINE) == 2
    assert {f"method {n}" for n in range(7)} < {text.get_text() for text in headings}
    assert len(by_gid(figure, "crop")) == 9 and len({each.get_bbox().bounds for each in by_gid(figure, "crop")}) == 1
    assert min(ax.get_position().width for ax in figure.axes) * figure.get_figwidth() > 1, "inches"
    assert_legible(figure)


def test_the_baseline_stands_first(measured):
    figure = drawn(Rows(settings=("H2-Cache, tau1 = 0.15, tau2 = 0.1", BASELINE)), measured)
    headings = [text for text in figure.texts if text.get_weight() == "bold"]
    assert min(headings, key=lambda text: text.get_position()[0]).get_text() == BASELINE


# The user's mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetricTrace(settings=("H2",)), "no setting 'H2' to draw; it has: 'Baseline'"),
        (lambda: Rows(prompt_ids=("nobody",)), "no prompt_id 'nobody'"),
        (lambda: Frontier(quality="beauty"), "no measure 'beauty' to draw; it has psnr"),
        (
            lambda: HeatMap(rows="tau2", columns="pool1", values=("psnr",), name="pools"),
            "pools: .* both have tau2=0.1, pool1=16; say which one is meant",
        ),
        (lambda: Rows(count=0), "count=0 is not allowed"),
        (lambda: Rows(crop=1.5), "crop=1.5 is not allowed"),
        (lambda: Separation(amplify=0), "amplify=0 is not allowed"),
        (lambda: HeatMap(marked={"tau1": 0.1}), "marked=.* is not allowed: it must be tau1 and tau2"),
        (lambda: HeatMap(name="../map"), "must be a file name"),
    ],
)
def test_a_mistake_is_named(make, message, measured, tmp_path):
    measured.frame["fields"] = [fields | {"pool1": 16} if fields else fields for fields in measured.frame["fields"]]
    with pytest.raises(UserError, match=message):
        make().make(measured, tmp_path)


@pytest.mark.parametrize("output", [Rows(), Separation()])
def test_a_broken_image_is_named(output, measured, tmp_path):
    measured.frame["image"].iloc[1].write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="cannot read the image"):
        output.make(measured, tmp_path)
