"""Blind preference: the ballot of the page in a real browser, and its votes counted."""

import json
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from measured import results, row

from h2cache.eval import __main__ as program
from h2cache.eval.errors import UserError
from h2cache.eval.report import page
from h2cache.eval.report.results import BASELINE
from h2cache.eval.report.votes import FORMAT, preference, read_votes, table

HOSTILE = "<img src=x onerror=\"window.pwned = 2\"><b>bold</b> & 'a'"
METHODS = ["H2-Cache", "TeaCache", HOSTILE, "HiCache"]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page of one experiment: five prompts, four methods, and images that all differ."""
    folder = tmp_path_factory.mktemp("results")
    rows = []
    for k, prompt in enumerate([HOSTILE, "b", "c", "d", "e"]):
        rows.append(row(folder, BASELINE, BASELINE, prompt, f"a picture of {prompt}", 4.0, psnr=math.inf))
        for shift, method in enumerate(METHODS):
            rows.append(
                row(folder, method, method, prompt, f"a picture of {prompt}", 2.0, shift=20 * shift + 3 * k + 5)
            )
    target = folder / "report.html"
    page.write([(results(rows, name="table1"), [])], {}, target)
    return target


def expect(locator):
    """Playwright's, which waits; the page's policy keeps it from evaluating a condition there."""
    from playwright.sync_api import expect

    return expect(locator)


@pytest.fixture
def opened(chromium, report):
    pages = []

    def open_page(**viewport):
        context = chromium.new_context(viewport={"width": 1200, "height": 900} | viewport)
        browser_page = context.new_page()
        browser_page.complaints = []
        browser_page.on("console", lambda message: browser_page.complaints.append(message.text))
        browser_page.on("pageerror", lambda error: browser_page.complaints.append(str(error)))
        browser_page.goto(report.as_uri())
        pages.append(browser_page)
        return browser_page

    yield open_page
    for each in pages:
        assert each.complaints == [] and each.evaluate("window.pwned") is None
        each.context.close()


def begin(browser_page, voter: str, pairs: int):
    blind = browser_page.locator("#blind-1")
    blind.locator(".voter").fill(voter)
    blind.locator(".count").fill(str(pairs))
    blind.get_by_role("button", name="Begin").click()
    return blind


def exported(browser_page, tmp_path) -> dict:
    with browser_page.expect_download() as download:
        browser_page.locator("#blind-1 .export").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    return json.loads(file.read_text(encoding="utf-8")) | {"file": file}


def result(blind) -> dict[str, list[str]]:
    expect(blind.locator(".state")).to_contain_text(" of ")  # told once the ballot has closed
    rows = [each.locator("td").all_text_contents() for each in blind.locator(".result tr").all()]
    return {name: others for name, *others in rows[1:]}


def test_twenty_votes_by_keys_undo_export_and_a_result(opened, tmp_path):
    browser_page = opened()
    blind = begin(browser_page, "Ann", 20)
    ballot = blind.locator(".ballot")
    names, sources = [BASELINE, *METHODS[:2], METHODS[3]], set()
    for k in range(20):
        assert ballot.locator(".progress").text_content() == f"{k + 1} of 20"
        assert not [name for name in names if name in ballot.inner_html() and name not in "ballot"]
        assert "bold" not in re.sub(r"a picture of .*?</p>", "</p>", ballot.inner_html())
        shown = tuple(ballot.locator(f"img.{side}").get_attribute("src") for side in ("first", "second"))
        assert shown[0] != shown[1]
        sources.add(frozenset(shown))
        browser_page.keyboard.press("120"[k % 3])
        if k == 4:  # a vote is taken back: the same pair on the same sides
            browser_page.keyboard.press("Backspace")
            assert ballot.locator(".progress").text_content() == "5 of 20"
            again = tuple(ballot.locator(f"img.{side}").get_attribute("src") for side in ("first", "second"))
            assert again == shown
            browser_page.keyboard.press("0")
    expect(ballot).not_to_be_visible()
    assert len(sources) == 20
    told = exported(browser_page, tmp_path)
    assert (told["format"], told["experiment"], told["voter"], len(told["votes"])) == (FORMAT, "table1", "Ann", 20)
    assert told["votes"][4]["preferred"] is None, "the second vote on the pair counts"
    for k, vote in enumerate(told["votes"]):
        right = vote["setting"] if vote["left"] == BASELINE else BASELINE
        assert k == 4 or vote["preferred"] == (vote["left"], right, None)[k % 3]
    assert {vote["left"] == BASELINE for vote in told["votes"]} == {True, False}, "both sides"
    sheet, data = table(read_votes([told["file"]]))
    assert result(blind) == {name: list(others) for name, *others in sheet.rows}, "the page counts as we do"
    assert set(data["setting"]) == set(METHODS)
    expect(blind.locator(".state")).to_contain_text("20 votes of 1 voter.")


def test_pairs_come_in_another_order_each_time_and_every_method_has_its_share(opened):
    orders = []
    for _ in range(2):
        browser_page = opened()
        blind = begin(browser_page, "", 8)
        order = []
        for _ in range(8):
            order.append(blind.locator(".ballot img.first").get_attribute("src"))
            browser_page.keyboard.press("1")
        orders.append(order)
        assert [sum(map(int, counts[:3])) for counts in result(blind).values()] == [2, 2, 2, 2]
    assert orders[0] != orders[1]


def test_an_imported_file_goes_on_and_other_voters_count_beside(opened, tmp_path):
    browser_page = opened()
    begin(browser_page, "Ann", 20)
    for key in "111":
        browser_page.keyboard.press(key)
    browser_page.locator("#blind-1 .stop").click()
    ann = exported(browser_page, tmp_path)
    assert len(ann["votes"]) == 3
    other = {name: ann[name] for name in ("format", "model", "experiment", "votes")} | {"voter": "Bob"}
    (tmp_path / "bob.json").write_text(json.dumps(other))

    browser_page = opened()
    blind = browser_page.locator("#blind-1")
    blind.locator(".voter").fill("Ann")
    blind.locator(".import").set_input_files([ann["file"], tmp_path / "bob.json"])
    expect(blind.locator(".state")).to_have_text("6 votes of 2 voters.")
    blind.get_by_role("button", name="Begin").click()
    assert blind.locator(".progress").text_content() == "4 of 20", "hers go on"
    for _ in range(17):
        browser_page.keyboard.press("2")
    expect(blind.locator(".state")).to_have_text("23 votes of 2 voters.")
    assert sum(sum(map(int, counts[:3])) for counts in result(blind).values()) == 23


def test_a_file_of_something_else_is_refused(opened, tmp_path):
    browser_page = opened()
    (tmp_path / "other.json").write_text(
        json.dumps({"format": FORMAT, "model": "m", "experiment": "e", "voter": "x", "votes": []})
    )
    (tmp_path / "list.json").write_text("[1]")
    state = browser_page.locator("#blind-1 .state")
    for name, said in (("other", "its votes are of another experiment"), ("list", "it holds no votes")):
        browser_page.locator("#blind-1 .import").set_input_files(tmp_path / f"{name}.json")
        expect(state).to_have_text(f"{name}.json: {said}.")


def test_markup_stays_text_in_ballot_and_result(opened):
    browser_page = opened()
    blind = begin(browser_page, "<b>x</b>", 20)
    for _ in range(20):
        assert blind.locator(".ballot .prompt").text_content().startswith("a picture of ")
        browser_page.keyboard.press("1")
    assert HOSTILE in result(blind) and blind.locator("b, img[src=x]").count() == 0


@pytest.mark.parametrize("width", [400, 1200])
def test_the_ballot_fits_the_window(opened, width):
    browser_page = opened(width=width, height=800)
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= width
    blind = begin(browser_page, "Ann", 3)
    assert browser_page.evaluate("document.querySelector('.ballot').scrollWidth") <= width
    for button in blind.locator(".ballot button").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800
    browser_page.get_by_role("button", name="2 right").click()
    assert blind.locator(".progress").text_content() == "2 of 3"


# Counting


def file_of(folder: Path, voter: str, choices: list[str | None], experiment: str = "table1") -> Path:
    """A file of votes on H2-Cache, one prompt each."""
    votes = [
        {"prompt": f"p{k}", "setting": "H2-Cache", "against": BASELINE, "preferred": choice, "left": BASELINE}
        for k, choice in enumerate(choices)
    ]
    file = folder / f"{voter}.json"
    told = {"format": FORMAT, "model": "flux-mini", "experiment": experiment, "voter": voter, "votes": votes}
    file.write_text(json.dumps(told))
    return file


def test_votes_are_counted_with_wilson_s_interval_and_the_sign_test(tmp_path):
    """8 of 10: 49 to 94 % (Wilson), and p = 2 (1 + 10 + 45) / 1024."""
    choices = ["H2-Cache"] * 8 + [BASELINE] * 2 + [None] * 3
    found = preference(read_votes([file_of(tmp_path, "Ann", choices)]))
    assert (found.wins, found.losses, found.ties, found.rate) == (8, 2, 3, 0.8)
    z = 1.959963984540054
    middle, spread = 0.8 + z**2 / 20, z * math.sqrt(0.16 / 10 + z**2 / 400)
    assert found.low == pytest.approx((middle - spread) / (1 + z**2 / 10))
    assert found.high == pytest.approx((middle + spread) / (1 + z**2 / 10))
    assert found.p == pytest.approx(2 * 56 / 1024)


def test_voters_are_merged_and_nobody_counts_twice(tmp_path):
    ann, bob = file_of(tmp_path, "Ann", ["H2-Cache"] * 3), file_of(tmp_path, "Bob", [BASELINE] * 3)
    sheet, data = table(read_votes([ann, bob, ann]))
    assert sheet.rows == (("H2-Cache", "3", "3", "0", "50 %", "19 to 81 %", "1.000"),)
    assert "6 votes of 2 voters" in sheet.notes[1] and "No setting is preferred" in sheet.notes[0]
    assert data["wins"].tolist() == [3]
    no_difference = table(read_votes([file_of(tmp_path, "Eve", [None])]))[0]
    assert no_difference.rows == (("H2-Cache", "0", "0", "1", "–", "–", "–"),)


def test_what_are_no_votes_is_said(tmp_path):
    (tmp_path / "x.json").write_text('{"votes": 3}')
    files = [file_of(tmp_path, "Ann", ["H2-Cache"]), file_of(tmp_path, "Bob", ["H2-Cache"], experiment="solvers")]
    for given, says in (
        ([tmp_path / "x.json"], "holds no votes"),
        ([tmp_path / "none.json"], "cannot read"),
        ([file_of(tmp_path, "Eve", ["TeaCache"])], "neither of a pair"),
        (files, "solvers on flux-mini, table1 on flux-mini"),
        ([], "there are no votes"),
    ):
        with pytest.raises(UserError, match=says):
            read_votes(given)


def test_the_command_writes_the_table(tmp_path, monkeypatch, capsys):
    file = file_of(tmp_path, "Ann", ["H2-Cache"] * 9)
    monkeypatch.setattr(sys, "argv", ["eval", "votes", str(file), f"out={tmp_path}"])
    program.main()
    assert "Beyond chance" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "votes/preference.csv")["p"][0] == pytest.approx(2 / 2**9)
    monkeypatch.setattr(sys, "argv", ["eval", "votes", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2 and "none.json" in capsys.readouterr().err
