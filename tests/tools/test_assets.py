"""`make assets`: every derived file has one entry, what is out of date is made in order and no more, and what moved is
told."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from repository import REPOSITORY

from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS
from tools import assets
from tools.assets import Entry, Made, chosen, digests, entries_of, files, make
from tools.moved import compared, measured, numbers, report

# What is made from the weights of the embedded models, in the repository.
DERIVED = (
    "assets/plans/*",
    "assets/plans/*/*",
    "assets/*/README.md",
    "assets/*/*.png",
    "configs/*/flux-mini.yaml",
    "configs/*/hunyuan-mini.yaml",
    "docs/results/*/*",
    "docs/results/environment.json",
)
# Chosen by hand, or a description of the model.
BY_HAND = {f"configs/{group}" for group in ("model", "plan", "preset", "protocol/model")} | {"assets/prompts"}


@pytest.fixture(scope="module")
def entries():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return entries_of(compose("assets"))


@pytest.fixture
def copy(tmp_path, entries):
    """The names of the files that the entries are made from and make, each with a word in it; all is made."""
    for entry in entries:
        for file in files(REPOSITORY, [*entry.inputs, *entry.makes]):
            target = tmp_path / file.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("old")
    made = Made(tmp_path)
    made.note({entry: digests(tmp_path, entry.inputs) for entry in entries if made.has_weights(entry)})
    return tmp_path


def test_every_derived_file_is_made_by_exactly_one_entry(entries):
    derived = {file for file in files(REPOSITORY, DERIVED) if str(file.parent.relative_to(REPOSITORY)) not in BY_HAND}
    assert len(derived) > 100
    made = [file for entry in entries for file in files(REPOSITORY, entry.makes)]
    assert not derived - set(made), "no entry of configs/assets.yaml makes these"
    assert len(made) == len(set(made)), "two entries make the same file"


def test_entries_name_what_exists(entries):
    """And none is made from what a later one makes."""
    made = Made(REPOSITORY)
    for index, entry in enumerate(entries):
        patterns = [*entry.inputs, *entry.makes] if made.has_weights(entry) else []
        assert all(files(REPOSITORY, [pattern]) for pattern in patterns), entry.name
        later = [pattern for each in entries[index:] for pattern in each.makes]
        assert not {*files(REPOSITORY, later)} & {*files(REPOSITORY, entry.inputs)}, entry.name
        modules = [re.match(r"python -m (\S+)", command)[1] for command in entry.commands]
        assert all(find_spec(module) for module in modules), entry.name


def test_with_the_weights_that_are_here_nothing_is_done(entries):
    def status():
        return subprocess.run(["git", "status", "--porcelain"], cwd=REPOSITORY, capture_output=True, text=True).stdout

    before = status()
    assert not Made(REPOSITORY).due(entries), "make assets, or python -m tools.assets mark=[...] after a run by hand"
    words = [sys.executable, "-m", "tools.assets"]
    run = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "nothing to do" in run.stdout and status() == before


def test_changed_weights_put_everything_out_of_date_in_order(copy, entries):
    assert not Made(copy).due(entries)
    (copy / "assets/flux-mini/transformer/diffusion_pytorch_model.safetensors").write_text("new")
    due = Made(copy).due(entries)
    assert list(due) == [entry for entry in entries if not entry.name.endswith("/hunyuan-mini")]
    assert set(due.values()) == {"assets/flux-mini/*/* changed"}


def test_what_is_made_from_something_out_of_date_is_as_well(copy, entries):
    def due(**more):
        return {entry.name: why for entry, why in Made(copy).due(entries, **more).items()}

    asked = due(again=chosen(entries, "again", "teacache/flux-mini"))
    above = "made from teacache/flux-mini"
    results = ("usual", "combine", "seeds", "flux-mini-upscaler")
    assert asked == {"teacache/flux-mini": "asked for"} | {f"results/{name}": above for name in results}
    (copy / "assets/flux-mini-upscaler/diffusion_pytorch_model.safetensors").write_text("new")
    assert list(due()) == [f"{part}/flux-mini-upscaler" for part in ("card", "plans", "results")]
    (copy / "docs/results/environment.json").unlink()
    assert due()["results/usual"] == "docs/results/environment.json missing"


def test_weights_that_come_are_made_from(copy, entries):
    shutil.rmtree(copy / "assets/hunyuan-mini")
    assert not Made(copy).due(entries), "without weights there is nothing to make"
    (copy / "assets/hunyuan-mini/transformer").mkdir(parents=True)
    (copy / "assets/hunyuan-mini/transformer/model.safetensors").touch()
    names = [f"{part}/hunyuan-mini" for part in ("card", "teacache", "plans", "results")]
    assert [entry.name for entry in Made(copy).due(entries)] == names


SCRIPT = """import pathlib, sys
name, source, code = sys.argv[1:]
with pathlib.Path("calls").open("a") as file:
    file.write(name)
if pathlib.Path("stop").exists() and int(code):
    sys.exit(int(code))
pathlib.Path(name).write_text(pathlib.Path(source).read_text()[:3])
"""


def chain(root: Path, code: int) -> list[Entry]:
    """b is made from a, which is made from the first three letters of `weights`; c from the weights alone. b ends with
    this exit code while a file `stop` is there."""
    (root / "make.py").write_text(SCRIPT)
    (root / "weights").write_text("one")
    (root / "assets").mkdir()
    return [
        Entry("letters/a", ("weights",), ("python make.py a weights 0",), ("a",), minutes=2),
        Entry("letters/b", ("weights",), (f"python make.py b a {code}",), ("b",), after=("a",)),
        Entry("c", ("weights",), ("python make.py c weights 0",), ("c",)),
    ]


@pytest.mark.parametrize(("code", "error"), [(3, UserError), (130, KeyboardInterrupt)])
def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, code, error):
    listed, said = chain(tmp_path, code), []
    (tmp_path / "stop").touch()
    with pytest.raises(error, match="letters/b.*exit code 3" if code == 3 else None):
        make(Made(tmp_path), listed, [], said.append)
    assert (tmp_path / "calls").read_text() == "ab" and "letters/a, about 2 min: not finished yet" in said
    (tmp_path / "stop").unlink()
    make(Made(tmp_path), listed, [], said.append)
    assert (tmp_path / "calls").read_text() == "abbc"
    make(Made(tmp_path), listed, [], said.append)
    assert (tmp_path / "calls").read_text() == "abbc" and "nothing to do" in said[-1]


def test_what_was_asked_for_again_is_not_forgotten_when_stopped(tmp_path):
    listed, said = chain(tmp_path, 3), []
    make(Made(tmp_path), listed, [], said.append)
    (tmp_path / "stop").touch()
    with pytest.raises(UserError):
        make(Made(tmp_path), listed, chosen(listed, "again", ["letters", "c"]), said.append)
    (tmp_path / "stop").unlink()
    make(Made(tmp_path), listed, [], said.append)
    assert (tmp_path / "calls").read_text() == "abc" + "ab" + "bc"


def test_what_came_out_as_before_leaves_the_rest_alone(tmp_path):
    listed, said = chain(tmp_path, 0), []
    make(Made(tmp_path), listed, [], said.append)
    record = (tmp_path / assets.RECORD).read_bytes()
    make(Made(tmp_path), listed, listed[:1], said.append)
    assert (tmp_path / "calls").read_text() == "abca"
    assert said[-1] == "letters/b: what it is made from came out as before"
    assert (tmp_path / assets.RECORD).read_bytes() == record


def test_what_only_a_training_makes_is_asked_for_before_anything_is_made(tmp_path):
    listed = chain(tmp_path, 0)
    card = Entry("card", ("weights",), ("python make.py card weights 0",), ("card",), needs="build/log.csv")
    with pytest.raises(UserError, match=r"card.*no build/log.csv.*work=FOLDER"):
        make(Made(tmp_path), [*listed, card], [], print)
    assert not (tmp_path / "calls").exists() and not (tmp_path / assets.RECORD).exists()


def test_a_command_that_does_not_make_its_files_is_an_error(tmp_path):
    chain(tmp_path, 0)
    wrong = Entry("wrong", ("weights",), ("python make.py a weights 0",), ("d",))
    with pytest.raises(UserError, match="wrong: its commands did not make d"):
        make(Made(tmp_path), [wrong], [], print)
    assert list(Made(tmp_path).due([wrong])) == [wrong]


def test_entries_are_chosen_by_name_by_kind_or_all(entries):
    assert {entry.name for entry in chosen(entries, "again", ["plans", "results/combine"])} == {
        *(f"plans/{kind}" for kind in ("uncached", "converged", "few_steps", "budcache", "l2p", "dpcache", "bespoke")),
        *(f"plans/{model}" for model in ("hunyuan-mini", "flux-mini-upscaler")),
        "results/combine",
    }
    assert chosen(entries, "only", "all") == entries and chosen(entries, "again", []) == []
    with pytest.raises(UserError, match=r"again=plan: .* choose from all, card"):
        chosen(entries, "again", "plan")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [(["again=[nope]"], 2, "again=nope: there is no such entry"), (["agian=all"], 2, "there is no field agian")],
)
def test_errors_are_one_sentence(monkeypatch, capsys, arguments, code, told):
    monkeypatch.setattr(sys, "argv", ["assets", *arguments])
    with pytest.raises(SystemExit) as ended:
        assets.main()
    error = capsys.readouterr().err
    assert ended.value.code == code and error.startswith(f"assets: error: {told}") and error.count("\n") == 1


def test_ctrl_c_is_130(monkeypatch, capsys):
    def stopped(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "run", stopped)
    monkeypatch.setattr(sys, "argv", ["assets"])
    with pytest.raises(SystemExit) as ended:
        assets.main()
    assert ended.value.code == 130 and capsys.readouterr().err.startswith(
        "assets: interrupted; what was finished stays"
    )


TABLE = """Images: {count}.

| setting | time, s (speedup) | PSNR, dB |
|---|---:|---:|
| Baseline | {seconds} (1.00x) | – |
| H2-Cache | 0.63 ({speedup}x) | {psnr} |
"""
PAGE = """# 99 dB

<!-- table a/b -->
| a | 7 dB |
<!-- /table -->

| a | dB |
|---|---:|
| b | 6 dB |
| c | none |

```
8 dB
```

It is 3.1 dB ahead with 12 evaluations. Nothing here
counts. So the text
ends with 5 % more.
"""


@pytest.fixture
def repository(tmp_path):
    """In git: a table, a plan, a picture, and a page that people write."""
    (tmp_path / "table.md").write_text(TABLE.format(count=80, seconds=1.24, speedup=1.96, psnr=38.23))
    (tmp_path / "plan.json").write_text(json.dumps({"computed": [0, 2, 4], "harness_overhead": 0.1}))
    (tmp_path / "page.md").write_text(PAGE)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    return tmp_path


def told(root: Path) -> str:
    return report(root, ["*.md", "*.json", "*.png", "*.tex"], [root / "page.md"])


def test_what_moved_is_found_and_times_are_not(repository):
    assert told(repository) == ""
    (repository / "table.md").write_text(TABLE.format(count=80, seconds=9.9, speedup=7.5, psnr=38.23))
    assert compared(repository, "table.md")[1:] == (0, 2, 0, "", 0, 0)
    assert "table.md" in told(repository) and "Typed by hand" not in told(repository)
    (repository / "table.md").write_text(TABLE.format(count=81, seconds=9.9, speedup=7.5, psnr=30.5))
    assert compared(repository, "table.md")[1:] == (2, 2, 0, "H2-Cache: PSNR, dB", 38.23, 30.5)
    assert re.search(r"table.md +2 of 2 +0 +H2-Cache: PSNR, dB +38.23 +30.5", told(repository))


def test_keys_that_come_or_go_are_counted_apart(repository):
    (repository / "plan.json").write_text(json.dumps({"computed": [0, 3], "harness_overhead": 0.2}))
    assert compared(repository, "plan.json")[1:] == (1, 2, 1, "computed.1", 2, 3)
    (repository / "plan.json").unlink()
    assert compared(repository, "plan.json")[1:4] == (0, 0, 3)
    (repository / "new.json").write_text("[1, true]")
    assert compared(repository, "new.json")[1:4] == (0, 0, 1) and "new.json" in told(repository)


def test_pictures_are_compared_part_by_part(repository):
    image = Image.new("RGB", (16, 16))
    image.paste("white", (14, 2, 16, 4))
    image.save(repository / "a.png")
    assert compared(repository, "a.png")[1:] == (1, 66, 0, "brightness of part 1, 7 of 8x8", 0, 255)


def test_sentences_with_measured_numbers_are_listed_when_a_number_moved(repository):
    sentences = [
        (9, "| b | 6 dB |"),
        (16, "It is 3.1 dB ahead with 12 evaluations."),
        (17, "So the text ends with 5 % more."),
    ]
    assert list(measured(PAGE)) == sentences
    (repository / "plan.json").write_text(json.dumps({"computed": [0, 3, 4]}))
    listed = told(repository).split("Typed by hand; read whether they still hold:\n")[1]
    assert listed == "".join(f"page.md:{line}: {sentence}\n" for line, sentence in sentences)


def test_numbers_of_the_repository_have_names():
    """A column of times is left out, a column of decibels is not; a polynomial is read by its keys."""

    def of(file):
        return numbers(file, (REPOSITORY / file).read_bytes())

    table = of("docs/results/table1/summary.md")
    assert {"Plan: PSNR, dB", "Plan: evaluations"} <= set(table) and not [name for name in table if "time" in name]
    assert not [name for name in of("docs/results/table1/spread.md") if name.startswith("Plan")]
    assert not [name for name in of("docs/results/throughput/throughput.md") if name.startswith("HiCache")]
    assert set(of("configs/teacache/flux-mini.yaml")) >= {"threshold", "coefficients.0"}


def test_a_factor_is_a_time():
    assert list(numbers("a.md", b"2.97x as fast at 31.25 dB.").values()) == [31.25]


def test_outside_of_git_the_error_says_so(tmp_path):
    with pytest.raises(UserError, match="cannot compare with git's HEAD"):
        report(tmp_path, ["*"], [])
