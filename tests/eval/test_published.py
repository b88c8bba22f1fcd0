"""The papers' numbers beside ours: verdicts follow from intervals, and the page says what the data file says."""

import csv
import html
import math
import re
from functools import partial

import pytest
from composing import composed_method
from hydra import compose, initialize_config_dir
from measured import results, row
from repository import REPOSITORY

from h2cache.eval.experiments.study import Study, read_study
from h2cache.eval.metrics.registry import kind
from h2cache.eval.report import page, published
from h2cache.eval.report.results import BASELINE, Results

CLAIMS = published.read_claims()
BY_ID = {claim["id"]: claim for claim in CLAIMS["claims"]}
PROMPTS = 8
WRITTEN = REPOSITORY / "docs/results/published/published.md"


def measured(folder, settings: dict[str, dict], **told) -> Results:
    """Eight prompts: k takes the baseline 4 + k seconds of denoising, and a setting with values (speedup, psnr, ...)
    1 / speedup of that; its PSNR is psnr + k / 10."""
    rows = []
    for k in range(PROMPTS):
        prompt = {"prompt_id": f"p{k}", "prompt": "a sign"}
        rows.append(row(folder, BASELINE, BASELINE, seconds=4.0 + k, clipiqa_published=0.8 + k / 100, **prompt))
        for name, values in settings.items():
            about = {"psnr": math.nan, "clipiqa_published": math.nan} | values
            speedup, psnr = about.pop("speedup"), about.pop("psnr") + k / 10
            rows.append(row(folder, name, name, seconds=(4.0 + k) / speedup, psnr=psnr, **about, **prompt))
    metrics = ("psnr", "ssim", "clipiqa_published")
    return results(rows, **({"unavailable": {}, "metrics": metrics} | told))


def made(found: list[Results], folder, claims=CLAIMS) -> dict[str, dict[str, str]]:
    """The CSV's rows by id."""
    artifact = published.make(found, folder, claims)
    (path,) = (file for file in artifact.files if file.suffix == ".csv")
    with path.open() as file:
        return {line["id"]: line for line in csv.DictReader(file)}


# Verdicts


@pytest.mark.parametrize(
    ("rule", "low", "high", "value", "expected"),
    [
        ("reaches", 4.0, 5.5, 5.08, "reproduced"),
        ("reaches", 5.2, 5.5, 5.08, "reproduced"),
        ("reaches", 3.1, 3.4, 5.08, "contradicted"),
        ("reaches", -0.20, 0.10, -0.07, "reproduced"),
        ("ahead", 0.1, 0.4, None, "reproduced"),
        ("ahead", -0.1, 0.4, None, "undecided"),
        ("ahead", -0.4, -0.1, None, "contradicted"),
        ("ahead", 0.0, 0.0, None, "contradicted"),
        ("faster", 0.9, 1.1, None, "undecided"),
        ("faster", 1.01, 1.1, None, "reproduced"),
        ("faster", 0.8, 0.99, None, "contradicted"),
        ("reaches", math.nan, math.nan, 5.08, "undecided"),
        ("ahead", math.nan, math.nan, None, "undecided"),
    ],
)
def test_a_verdict_follows_from_the_interval(rule, low, high, value, expected):
    assert published.verdict(CLAIMS["rules"][rule], low, high, value) == expected


def test_a_speedup_is_of_mean_times_and_the_difference_is_to_the_published_number(tmp_path):
    """Every prompt is denoised 3 times as fast, so that the interval has no width."""
    setting = BY_ID["hicache-speedup"]["measured"]["setting"]
    found = measured(tmp_path, {setting: {"speedup": 3.0}}, name="table1")
    (claim,) = (each for each in made([found], tmp_path).values() if each["id"] == "hicache-speedup")
    assert float(claim["ours"]) == pytest.approx(3.0) and float(claim["n"]) == PROMPTS
    assert claim["verdict"] == "contradicted"
    table = (tmp_path / "published.md").read_text()
    assert "| 5.55x | 3.00x \\[3.00, 3.00\\] | -2.55x \\[-2.55, -2.55\\] |" in table


def test_a_difference_of_two_settings_is_paired(tmp_path):
    """Prompts differ by 0.1 dB from one to the next, the two settings by exactly 2 dB on each."""
    settings = {"Hi-ClusCa": {"speedup": 2.0, "psnr": 42.0}, "ClusCa": {"speedup": 2.0, "psnr": 40.0}}
    claim = made([measured(tmp_path, settings, name="table1")], tmp_path)["hi-clusca-direction"]
    assert [float(claim[each]) for each in ("ours", "ours_ci95_low", "ours_ci95_high")] == pytest.approx([2.0] * 3)
    assert claim["verdict"] == "reproduced"
    other = {"Hi-ClusCa": settings["ClusCa"], "ClusCa": settings["Hi-ClusCa"]}
    assert (
        made([measured(tmp_path, other, name="table1")], tmp_path)["hi-clusca-direction"]["verdict"] == "contradicted"
    )


def test_a_metric_of_an_image_by_itself_changes_in_percent(tmp_path):
    """CLIP-IQA of 0.8272 on every prompt, the baseline's mean is 0.835: 0.93 % less."""
    settings = {"H2-Cache": {"speedup": 5.0, "clipiqa_published": 0.8272, "psnr": 30.0}}
    claim = made([measured(tmp_path, settings, name="matched")], tmp_path)["h2-clipiqa"]
    assert float(claim["ours"]) == pytest.approx(100 * (0.8272 / 0.835 - 1))
    assert float(claim["ours_ci95_low"]) < float(claim["ours"]) < float(claim["ours_ci95_high"])


def test_the_best_pair_of_two_metrics(tmp_path):
    """At the marked speed of 3 or above, PSNR is best at one pair and SSIM at another; the most careful is too slow."""
    marked = "H2-Cache, tau1 = 0.15, tau2 = 0.22"

    def pair(tau1, **values):
        return {"fields": {"tau1": tau1, "tau2": 0.22}, **values}

    settings = {
        "careful": pair(0.05, speedup=2.0, psnr=45.0, ssim=0.999),
        marked: pair(0.15, speedup=3.0, psnr=33.0, ssim=0.97),
        "bold": pair(0.2, speedup=3.5, psnr=31.0, ssim=0.98),
    }
    claim = made([measured(tmp_path, settings, name="ablation_thresholds")], tmp_path)["h2-pair"]
    assert float(claim["ours"]) == pytest.approx(2.0) and claim["verdict"] == "reproduced"
    settings["bold"]["ssim"] = 0.96
    claim = made([measured(tmp_path, settings, name="ablation_thresholds")], tmp_path)["h2-pair"]
    assert float(claim["ours"]) == 0 and claim["verdict"] == "contradicted", "one pair is best by both"


def test_too_few_prompts_decide_nothing(tmp_path):
    setting = BY_ID["hicache-speedup"]["measured"]["setting"]
    found = measured(tmp_path, {setting: {"speedup": 3.0}}, name="table1")
    few = results(found.frame[found.frame["prompt_id"] != "p3"].to_dict("records"), name="table1", unavailable={})
    claim = made([few], tmp_path)["hicache-speedup"]
    assert claim["verdict"] == "undecided: 7 prompts, a verdict takes 8" and float(claim["ours"]) == pytest.approx(3.0)


def test_what_cannot_be_measured_says_why(tmp_path):
    settings = {"H2-Cache": {"speedup": 5.0, "psnr": 30.0}}
    found = measured(tmp_path, settings, name="matched", unavailable={"clipiqa_published": "no weights"})
    claims = made([found], tmp_path)
    assert claims["h2-clipiqa"]["verdict"] == "not testable here: CLIP-IQA as published is n/a (no weights)"
    missing = "not testable here: matched has no images of TeaCache on flux-mini"
    assert claims["h2-over-teacache"]["verdict"] == missing
    assert claims["hicache-speedup"]["verdict"] == "not run: experiment=[table1]"
    assert claims["h2-speedup"]["ours"] == "n/a"


# The data file


def studies() -> list[Study]:
    found = []
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        for model in ("flux-mini", "flux1-dev"):
            cfg = compose("eval", overrides=[f"model={model}"])
            found.append(read_study(cfg, model, partial(composed_method, model)))
    return found


def test_every_claim_names_what_experiments_have():
    """On the embedded model and on FLUX.1-dev, whose settings stand under the same names."""
    for study in studies():
        settings = {each.name: {setting.name for setting in each.settings} for each in study.experiments}
        metrics = {each.name: each.metrics for each in study.experiments}
        for claim in CLAIMS["claims"]:
            assert ("not_testable" in claim) != ("measured" in claim), claim["id"]
            assert claim["source"] in CLAIMS["sources"]
            if "measured" not in claim:
                continue
            told = claim["measured"]
            named = [told[each] for each in ("setting", "against") if each in told]
            named = [each if isinstance(each, str) else each["as_fast_as"] for each in named]
            if told["experiment"] in settings:
                assert set(named) <= settings[told["experiment"]], claim["id"]
                quantity = told["quantity"]
                assert quantity in published.RATIOS or quantity in metrics[told["experiment"]], claim["id"]
            else:
                assert told["experiment"] == "matched" and set(named) <= {
                    BASELINE,
                    "Block Cache",
                    "TeaCache",
                    "H2-Cache",
                }
            assert told["quantity"] in published.RATIOS or kind(told["quantity"])
            rule = CLAIMS["rules"][claim["rule"]]
            assert ("published" in rule["reproduced"]) == ("value" in claim["published"]), claim["id"]


# The page


def text_of(claim: dict) -> tuple[str, str, str]:
    source = CLAIMS["sources"][claim["source"]]["name"]
    return claim["claim"], f"{source}, {claim['where']}", claim["published"]["text"]


def test_the_page_has_every_claim_in_a_section_of_its_own(tmp_path):
    found = measured(tmp_path, {"H2-Cache": {"speedup": 5.0, "psnr": 30.0}}, name="matched")
    beside = published.make([found], tmp_path / "published", CLAIMS)
    page.write([(found, [])], {}, tmp_path / "report.html", published=beside)
    written = (tmp_path / "report.html").read_text()
    assert 'href="#published"' in written and 'href="published/published.csv"' in written
    section = written[written.index('<section id="published">') :]
    rows = [
        tuple(html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", line))
        for line in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    ]
    assert [each[:3] for each in rows if each] == [text_of(claim) for claim in CLAIMS["claims"]]


def test_the_page_in_docs_has_the_claims_of_the_data_file():
    """It is copied from the results of a run; after a change of the data file it has to be made anew."""
    lines = [line for line in WRITTEN.read_text().splitlines() if line.startswith("| ")][1:]
    rows = [[html.unescape(re.sub(r"\\(.)", r"\1", cell)) for cell in line[2:-2].split(" | ")] for line in lines]
    assert [tuple(each[:3]) for each in rows] == [text_of(claim) for claim in CLAIMS["claims"]]
    words = ("reproduced", "contradicted", "undecided", "not testable here: ", "not run: ")
    assert all(each[-1].startswith(words) for each in rows)
