"""Tables say what was measured: statistics as scipy's and pandas', the paper's form, and nothing hidden that failed."""

import io
import math
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from h2cache.eval.errors import UserError
from h2cache.eval.report.results import BASELINE, Results
from h2cache.eval.report.tables import GridTable, SummaryTable
from h2cache.eval.report.tables.statistics import ratio, summarize

METRICS = ("clipiqa", "psnr", "ssim")


def row(setting: str, prompt: int, seconds: float, **values) -> dict:
    """A row as an experiment gives it, with 80 % of the time in denoising."""
    fields = values.pop("fields", {})
    baseline = setting == BASELINE
    return {
        "setting": setting,
        "method": setting,
        "fields": fields,
        "prompt_id": f"p{prompt}",
        "prompt": "a sign",
        "word": None,
        "seed": 0,
        "total_seconds": seconds,
        "denoising_seconds": 0.8 * seconds,
        "computed_fraction": 1.0 if baseline else 0.25,
        "evaluations": 50.0 if baseline else 12.5,
        "steps": 50,
        "solver": "FlowMatchEulerDiscreteScheduler",
        "hit_rates": {} if baseline else {"structure": 0.7, "detail": 0.75},
        "peak_memory_bytes": math.nan,
        "clipiqa": 0.75,
        "psnr": math.nan if baseline else 30.0,
        "ssim": math.nan if baseline else 0.95,
    } | values


def results(rows: list[dict], **fields) -> Results:
    told = {"name": "table1", "title": "Methods", "description": "", "metrics": METRICS, "unavailable": {}}
    told |= {"model": "flux-mini", "machine": "cpu", "command": "python -m eval", "frame": pd.DataFrame(rows)}
    told |= {"converged_run": "400 steps"}
    return Results(**(told | fields))


def two_methods() -> Results:
    """Baseline of 4 s and 6 s; one method four times, another twice as fast, that by chance has better scores."""
    rows = [row(BASELINE, i, s, clipiqa=c) for i, (s, c) in enumerate([(4.0, 0.70), (6.0, 0.80)])]
    rows += [row("H2-Cache", i, s, clipiqa=c) for i, (s, c) in enumerate([(1.0, 0.69), (1.5, 0.78)])]
    rows += [row("A & B_1", i, s, clipiqa=0.76) for i, s in enumerate([2.0, 3.0])]
    return results(rows)


def made(table: SummaryTable | GridTable, measured: Results, folder) -> tuple[str, pd.DataFrame, str]:
    """Markdown, CSV and LaTeX as they were written."""
    markdown, csv, latex = table.make(measured, folder).files
    return markdown.read_text(), pd.read_csv(csv), latex.read_text()


def cells(markdown: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell, escapes undone."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    plain = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first: others for first, *others in plain}


# Statistics


def test_a_summary_is_pandas_and_scipy_s():
    values = pd.Series(np.random.default_rng(0).lognormal(size=37))
    found = summarize(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    expected = (37, values.mean(), values.median(), values.quantile(0.95), low, high)
    assert (found.n, found.mean, found.median, found.p95, found.low, found.high) == pytest.approx(expected)


def test_a_summary_by_hand():
    """1, 2, 3, 4: the mean is 2.5, its error sqrt(5/3) / 2, and t for 3 degrees of freedom 3.18245."""
    found = summarize(pd.Series([4.0, 1.0, 3.0, 2.0]))
    margin = 3.18245 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.median, found.p95) == pytest.approx((2.5, 2.5, 3.85))
    assert (found.low, found.high) == pytest.approx((2.5 - margin, 2.5 + margin), rel=1e-5)


def test_what_is_not_there_is_counted_and_never_averaged():
    found = summarize(pd.Series([30.0, math.nan, math.inf, 40.0]))
    assert (found.n, found.infinite, found.count, found.mean) == (2, 1, 3, 35.0)
    one = summarize(pd.Series([3.0]))
    assert (one.n, one.mean) == (1, 3.0) and math.isnan(one.low) and math.isnan(one.high)
    none = summarize(pd.Series([], dtype=float))
    assert none.n == 0 and math.isnan(none.mean)


def test_a_ratio_is_of_the_means_of_pairs():
    """Prompt c has no baseline and b no value: (1 + 2) / (4 + 8) of a and d."""
    values = pd.Series({"a": 1.0, "b": math.nan, "c": 100.0, "d": 2.0})
    baseline = pd.Series({"d": 8.0, "a": 4.0, "b": 50.0})
    found = ratio(values, baseline)
    assert (found.n, found.value) == (2, 0.25)
    assert (found.low, found.high) == (0.25, 0.25), "both pairs have it, so every resample has"


def test_the_interval_of_a_ratio_is_scipy_s_bootstrap():
    generator = np.random.default_rng(1)
    below = generator.uniform(4, 6, 60)
    above = below * generator.uniform(0.2, 0.4, 60)
    found = ratio(pd.Series(above), pd.Series(below))
    reference = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        method="percentile",
        rng=generator,
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=3e-3)
    assert found.low < found.value < found.high
    shuffled = generator.permutation(60)
    assert ratio(pd.Series(above).iloc[shuffled], pd.Series(below)) == found


@pytest.mark.parametrize("baseline", [0.0, -1.0])
def test_no_change_in_percent_of_nothing(baseline):
    assert math.isnan(ratio(pd.Series([1.0, 2.0]), pd.Series([baseline, baseline])).value)


# The summary


def test_the_paper_s_form(tmp_path):
    """(4 + 6) / (1 + 1.5) = 4, (0.69 + 0.78) / (0.70 + 0.80) = 0.98."""
    markdown, _, _ = made(SummaryTable(), two_methods(), tmp_path)
    assert cells(markdown) == {
        "setting": ["time, s (speedup)", "CLIP-IQA", "PSNR, dB", "SSIM", "evaluations", "hits"],
        BASELINE: ["5.00 (1.00x)", "0.7500 (+0.00 %)", "–", "–", "50.0", "–"],
        "H2-Cache": [
            "1.25 (4.00x)",
            "0.7350 (-2.00 %)",
            "30.00",
            "0.9500",
            "12.5",
            "structure 70.0 %, detail 75.0 %",
        ],
        "A & B_1".replace("&", "&amp;"): [
            *("2.50 (2.00x)", "0.7600 (+1.33 %)", "30.00", "0.9500", "12.5", "structure 70.0 %, detail 75.0 %")
        ],
    }
    assert "2 prompts on flux-mini, cpu; time is with text encoding and VAE." in markdown


def test_denoising_time_is_a_choice_and_the_csv_has_both(tmp_path):
    whole, csv, _ = made(SummaryTable(), two_methods(), tmp_path / "a")
    denoising, same, _ = made(SummaryTable(time="denoising"), two_methods(), tmp_path / "b")
    assert cells(whole)["H2-Cache"][0] == "1.25 (4.00x)" and cells(denoising)["H2-Cache"][0] == "1.00 (4.00x)"
    pd.testing.assert_frame_equal(csv, same)
    assert csv["total_seconds_mean"].tolist() == [5.0, 1.25, 2.5]
    assert csv["denoising_seconds_mean"].tolist() == pytest.approx([4.0, 1.0, 2.0])
    with pytest.raises(UserError, match=r"'vae'.*end_to_end or denoising"):
        SummaryTable(time="vae")


def test_the_csv_has_every_number_at_full_precision(tmp_path):
    measured = two_methods()
    _, csv, _ = made(SummaryTable(), measured, tmp_path)
    csv = csv.set_index("setting")
    seconds = measured.frame.groupby("setting")["total_seconds"]
    assert csv["total_seconds_median"].to_dict() == seconds.median().to_dict()
    assert csv["total_seconds_p95"].to_dict() == pytest.approx(seconds.quantile(0.95).to_dict(), rel=1e-15)
    assert csv.loc["H2-Cache", "clipiqa_mean"] == (0.69 + 0.78) / 2
    assert csv.loc["H2-Cache", "total_seconds_speedup"] == 4.0
    assert csv.loc["H2-Cache", "clipiqa_change_percent"] == pytest.approx(-2.0)
    low, high = csv.loc["H2-Cache", ["clipiqa_change_percent_ci95_low", "clipiqa_change_percent_ci95_high"]]
    assert (low, high) == pytest.approx((100 * (0.78 / 0.80 - 1), 100 * (0.69 / 0.70 - 1))), "all of one prompt"
    assert csv["psnr_n"].to_dict() == {BASELINE: 0, "H2-Cache": 2, "A & B_1": 2} and set(csv["prompts"]) == {2}
    assert csv.loc["H2-Cache", "hit_rate.detail_mean"] == 0.75


def test_the_interval_of_a_speedup_goes_from_low_to_high(tmp_path):
    """Speedups of 4 and 2: a quarter of all resamples has one prompt alone, a quarter the other."""
    rows = [row(BASELINE, 0, 4.0), row(BASELINE, 1, 6.0), row("H2-Cache", 0, 1.0), row("H2-Cache", 1, 3.0)]
    _, csv, _ = made(SummaryTable(), results(rows), tmp_path)
    found = csv.loc[1, [f"total_seconds_speedup{end}" for end in ("_ci95_low", "", "_ci95_high")]]
    assert found.tolist() == pytest.approx([2, 2.5, 4])


def test_the_order_of_rows_changes_nothing(tmp_path):
    """With the settings as categories, as an experiment gives them, not even the order of the table's rows."""
    frame = two_methods().frame
    names = [BASELINE, "H2-Cache", "A & B_1"]
    frame["setting"] = pd.Categorical(frame["setting"], names)
    frame["total_seconds"] += 1 / 3
    written = []
    for seed in range(3):
        shuffled = results([], frame=frame.sample(frac=1, random_state=seed))
        written.append(made(SummaryTable(), shuffled, tmp_path))
    assert written[0][0] == written[1][0] == written[2][0] and written[0][2] == written[1][2]
    pd.testing.assert_frame_equal(written[0][1], written[1][1], check_exact=True)
    assert written[0][1]["setting"].tolist() == names


def test_what_equals_the_baseline_shows_no_change(tmp_path):
    rows = [
        row(name, i, s, clipiqa=c) for name in (BASELINE, "Same") for i, (s, c) in enumerate([(1.1, 0.3), (1.7, 0.6)])
    ]
    for each in rows[2:]:
        each |= {"psnr": math.inf, "ssim": 1.0}
    markdown, csv, _ = made(SummaryTable(), results(rows), tmp_path)
    assert cells(markdown)["Same"][:4] == ["1.40 (1.00x)", "0.4500 (+0.00 %)", "identical", "1.0000"]
    assert csv.loc[1, ["psnr_n", "psnr_identical"]].tolist() == [0, 2]
    speedup = csv.loc[1, [f"total_seconds_speedup{end}" for end in ("", "_ci95_low", "_ci95_high")]]
    assert speedup.tolist() == [1, 1, 1]


def test_identical_images_are_counted_apart(tmp_path):
    rows = [row(BASELINE, i, 2.0) for i in range(3)]
    rows += [row("H2-Cache", i, 1.0, psnr=value) for i, value in enumerate([30.0, math.inf, 34.0])]
    markdown, _, _ = made(SummaryTable(), results(rows), tmp_path)
    assert cells(markdown)["H2-Cache"][2] == "32.00 (1 identical)"


def test_missing_images_are_shown_and_comparisons_stay_paired(tmp_path):
    """Prompt 2, the slowest, failed with H2-Cache: 3 s against the 6 s of the same two prompts, not against 10."""
    rows = [row(BASELINE, i, s) for i, s in enumerate([5.0, 7.0, 18.0])]
    rows += [row("H2-Cache", 0, 2.0), row("H2-Cache", 1, 4.0)]
    rows += [row("Broken", i, math.nan, psnr=math.nan, ssim=math.nan, clipiqa=math.nan) for i in range(3)]
    frame = pd.DataFrame(rows)
    frame["setting"] = pd.Categorical(frame["setting"], [BASELINE, "H2-Cache", "Broken", "Never run"])
    markdown, csv, _ = made(SummaryTable(), results([], frame=frame), tmp_path)
    shown = cells(markdown)
    assert shown["H2-Cache"][0] == "3.00 [n = 2 of 3] (2.00x)" and shown["H2-Cache"][2] == "30.00 [n = 2 of 3]"
    assert set(shown["Broken"]) == set(shown["Never run"]) == {"failed"}
    assert "No image was made by: Broken, Never run." in markdown
    assert "over fewer prompts: H2-Cache." in markdown
    assert csv["total_seconds_n"].tolist() == [3, 2, 0, 0]


def test_a_baseline_that_lacks_a_prompt_says_so(tmp_path):
    rows = [row(BASELINE, 0, 4.0), *(row("H2-Cache", i, s) for i, s in enumerate([1.0, 3.0]))]
    markdown, _, _ = made(SummaryTable(), results(rows), tmp_path)
    assert cells(markdown)["H2-Cache"][0] == "2.00 (4.00x, n = 1)"


def test_without_a_baseline_there_is_nothing_to_compare_with(tmp_path):
    markdown, csv, _ = made(SummaryTable(), results([row("H2-Cache", 0, 1.5)]), tmp_path)
    assert cells(markdown)["H2-Cache"][:2] == ["1.50", "0.7500"]
    assert not any("speedup" in column for column in csv)


def test_unavailable_metrics_say_why(tmp_path):
    rows = [row(name, i, 1.0, clipiqa=math.nan) for name in (BASELINE, "H2-Cache") for i in range(2)]
    markdown, csv, _ = made(SummaryTable(), results(rows, unavailable={"clipiqa": "there is no network"}), tmp_path)
    assert "CLIP-IQA" not in cells(markdown)["setting"]  # a column of n/a would only make the table wide
    assert "n/a: CLIP-IQA (there is no network)." in markdown
    assert csv["clipiqa_mean"].isna().all()


def test_memory_has_a_column_where_it_was_measured(tmp_path):
    rows = [row(name, 0, 1.0, peak_memory_bytes=b) for name, b in ((BASELINE, 24.0e9), ("H2-Cache", 24.1e9))]
    markdown, _, _ = made(SummaryTable(metrics=()), results(rows), tmp_path)
    assert [line[2] for line in cells(markdown).values()] == ["peak memory, GB", "24.00", "24.10"]


def test_a_metric_that_was_not_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'lpips' is not measured by experiment table1.*clipiqa, psnr, ssim"):
        SummaryTable(metrics=("lpips",)).make(two_methods(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_measured_no_table(tmp_path):
    assert SummaryTable().make(results([row("Broken", 0, math.nan)]), tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_prompt_twice_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="same prompt and seed twice"):
        SummaryTable().make(results([row("H2-Cache", 0, 1.0), row("H2-Cache", 0, 2.0)]), tmp_path)


def test_names_are_text_in_every_form(tmp_path):
    name = r"50 % | <b>a_b</b> & $x$ #1 {c} \d ~^ *e*"
    rows = [row(BASELINE, 0, 2.0), row(name, 0, 1.0)]
    markdown, csv, latex = made(SummaryTable(metrics=()), results(rows), tmp_path)
    line = next(line for line in markdown.splitlines() if "50 %" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 6 - 1, "four cells and no more"
    assert "<b>" not in markdown and r"a\_b" in line and r"\*e\*" in line
    assert csv["setting"].tolist() == [BASELINE, name]
    assert (
        r"50 \% \textbar{} \textless{}b\textgreater{}a\_b\textless{}/b\textgreater{} \& \$x\$ \#1 \{c\} "
        r"\textbackslash{}d \textasciitilde{}\textasciicircum{} *e* & 1.00 (2.00x) & 12.5 & "
    ) in latex


def test_latex_has_the_same_cells(tmp_path):
    markdown, _, latex = made(SummaryTable(), two_methods(), tmp_path)
    body = latex.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    plain = [line.removesuffix(r" \\").replace(r"\%", "%").replace(r"\_", "_").replace("--", "–") for line in body]
    plain = [re.split(r" (?<!\\)& ", line.replace(r"\&", "&amp;")) for line in plain]
    assert [tuple(line) for line in plain] == [(first, *others) for first, others in list(cells(markdown).items())[1:]]
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:table1:summary}"))
    assert r"\begin{tabular}{lrrrrrr}" in latex


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk while the last file is written leaves the old three."""
    before = made(SummaryTable(), two_methods(), tmp_path)[0]

    def full(self, label):
        raise OSError("no space left on device")

    monkeypatch.setattr("h2cache.eval.report.tables.sheet.Sheet.to_latex", full)
    with pytest.raises(OSError, match="no space"):
        SummaryTable().make(results([row(BASELINE, 0, 9.0)]), tmp_path)
    assert (tmp_path / "summary.md").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.csv", "summary.md", "summary.tex"]


def test_the_terminal_shows_the_same(tmp_path):
    measured = two_methods()
    console = Console(file=io.StringIO(), width=160)
    console.print(SummaryTable().terminal(measured))
    shown = console.file.getvalue()
    assert "1.25 (4.00x)" in shown and "0.7350 (-2.00 %)" in shown and "A & B_1" in shown
    markup = results([row("[red]x[/red]", 0, 1.0)])
    console.print(SummaryTable().terminal(markup))
    assert "[red]x[/red]" in console.file.getvalue()


# The grid


def ablation() -> Results:
    """tau1 of 0.1 and 0.2, tau2 of 0.05, 0.15 and None, in no order; 0.2 and None was never run."""
    seconds = {(0.2, 0.15): 3.0, (0.1, 0.05): 2.0, (0.1, 0.15): 1.5, (0.1, None): 4.0, (0.2, 0.05): 1.0}
    rows = [row(BASELINE, i, 6.0) for i in range(2)]
    for (tau1, tau2), time in seconds.items():
        name = f"tau1 = {tau1}, tau2 = {tau2}"
        rows += [row(name, i, time, fields={"tau1": tau1, "tau2": tau2}) for i in range(2)]
    return results(rows)


def test_a_grid_is_laid_out_by_its_fields(tmp_path):
    markdown, csv, latex = made(GridTable("speedup"), ablation(), tmp_path)
    assert cells(markdown) == {
        "tau1 \\ tau2": ["0.05", "0.15", "None"],
        "0.1": ["3.00x", "4.00x", "1.50x"],
        "0.2": ["6.00x", "2.00x", "–"],
    }
    assert csv[["tau1", "tau2"]].iloc[0].tolist() == [0.1, 0.05] and len(csv) == 5
    assert csv["total_seconds_speedup"].tolist() == [3, 4, 1.5, 6, 2]
    assert r"0.1 & 3.00x & 4.00x & 1.50x \\" in latex
    assert (tmp_path / "speedup_by_tau1_and_tau2.md").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("denoising_speedup", "3.00x"),
        ("total_seconds", "2.00"),
        ("psnr", "30.00"),
        ("clipiqa", "0.7500"),
        ("computed_fraction", "25.0 %"),
        ("hit_rate.structure", "70.0 %"),
    ],
)
def test_a_grid_of_any_quantity(tmp_path, value, text):
    markdown, _, _ = made(GridTable(value), ablation(), tmp_path)
    assert cells(markdown)["0.1"][0] == text


def test_failed_cells_of_a_grid(tmp_path):
    frame = ablation().frame.iloc[:-1].copy()
    frame.loc[frame["setting"] == "tau1 = 0.1, tau2 = 0.05", "total_seconds"] = math.nan
    markdown, _, _ = made(GridTable("total_seconds"), results([], frame=frame), tmp_path)
    assert cells(markdown)["0.1"][0] == "failed" and cells(markdown)["0.2"][0] == "1.00 [n = 1 of 2]"


def test_a_cell_with_two_settings_is_refused_until_one_is_chosen(tmp_path):
    rows = [row(BASELINE, 0, 4.0)]
    for order, seconds in ((0, 2.0), (1, 1.0)):
        rows.append(row(f"order = {order}", 0, seconds, fields={"tau1": 0.1, "tau2": 0.2, "order": order}))
    with pytest.raises(UserError, match=r"'order = 0' and 'order = 1' both have tau1=0.1 and tau2=0.2.*where="):
        GridTable("speedup").make(results(rows), tmp_path)
    markdown, _, _ = made(GridTable("speedup", where={"order": 1}), results(rows), tmp_path)
    assert cells(markdown)["0.1"] == ["4.00x"]


def test_a_grid_of_what_was_not_measured(tmp_path):
    with pytest.raises(UserError, match=r"value='lpips' is not measured by table1; choose .*psnr"):
        GridTable("lpips").make(ablation(), tmp_path)
    assert GridTable("speedup").make(two_methods(), tmp_path) is None
