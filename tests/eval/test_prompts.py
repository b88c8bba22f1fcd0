"""Prompt sets: what is read from which file, and what a malformed one says before any image is made."""

import json

import pytest
import yaml
from hydra.utils import instantiate
from repository import REPOSITORY

from h2cache.eval.errors import UserError
from h2cache.eval.generation.prompts import HubPrompts, Prompt, PromptFile


@pytest.fixture
def file(tmp_path):
    """Writes lines (bytes, or what JSON makes of them) to a JSONL file."""

    def file(*lines: object) -> PromptFile:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
        return PromptFile(str(path))

    return file


@pytest.mark.parametrize("name", ["signs80", "cute80"])
def test_our_own_sets_have_eighty_prompts_with_a_word_each(name):
    prompts = instantiate(yaml.safe_load((REPOSITORY / f"configs/prompts/{name}.yaml").read_text())).load()
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 80
    assert all(prompt.text and prompt.word for prompt in prompts)


def test_our_schema(file):
    prompts = file({"id": "a", "prompt": "a sign", "word": "STOP", "phrasing": "x"}, {"prompt": "ein Schild, grün"})
    assert prompts.load() == (Prompt("a", "a sign", "STOP"), Prompt("1", "ein Schild, grün", None))


def test_the_schema_of_the_papers_captions(file):
    """The caption is a string, or a list that holds one."""
    rows = {"file_path": "a/1.jpg", "image_caption": ["a sign"]}, {"file_path": "a/2.jpg", "image_caption": "a wall"}
    assert file(*rows).load() == (Prompt("a/1.jpg", "a sign"), Prompt("a/2.jpg", "a wall"))


def test_line_ends_of_any_system_and_line_separators_inside_a_prompt(file):
    rows = [b'{"prompt": "one\xe2\x80\xa8line"}\r', b'{"prompt": "two"}\r', b""]
    assert [prompt.text for prompt in file(*rows).load()] == ["one\u2028line", "two"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "cut sho', "not JSON"),
        (b"", "empty"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (["a sign"], "list instead of an object"),
        ({"text": "a sign"}, "neither prompt nor image_caption; there is text"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": " "}, "prompt is ' '"),
        ({"prompt": None}, "prompt is None"),
        ({"image_caption": []}, "image_caption is a list of 0"),
        ({"image_caption": ["one", "two"]}, "image_caption is a list of 2"),
        ({"prompt": "a sign", "id": ["x"]}, "id is ['x']"),
        ({"prompt": "a sign", "word": 7}, "word is 7"),
        ({"prompt": "a sign", "id": "first"}, "the id 'first' is that of"),
        (b'{"prompt": "half \\ud83d"}', "surrogate"),
    ],
)
def test_a_malformed_line_is_named_with_file_line_and_reason(file, line, reason):
    prompts = file({"id": "first", "prompt": "a sign"}, line, {"prompt": "another"})
    with pytest.raises(UserError) as error:
        prompts.load()
    assert str(error.value).startswith(f"{prompts.path}, line 2: ")
    assert reason in str(error.value)


def test_files_without_prompts(file, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="line 1: empty"):
        PromptFile(str(tmp_path / "empty.jsonl")).load()
    with pytest.raises(UserError, match=r"prompts.path=nowhere.jsonl: no such file"):
        PromptFile("nowhere.jsonl").load()


@pytest.fixture
def dataset(tmp_path) -> str:
    """A folder as the hub has them, with a column of pictures' names beside the prompts."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = 'caption,name,word\n"a sign, red",one,STOP\na wall,two,\n'
    (folder / "train.csv").write_text(rows)
    return str(folder)


def test_a_dataset_of_the_hub_with_a_named_column(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert HubPrompts(dataset, "caption").load() == (Prompt("0", "a sign, red"), Prompt("1", "a wall"))
    named = HubPrompts(dataset, "caption", id_column="name", word_column="word")
    assert named.load() == (Prompt("one", "a sign, red", "STOP"), Prompt("two", "a wall"))


def test_what_is_wrong_with_a_dataset_is_one_sentence(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match=r"has no column text; choose from caption, name, word"):
        HubPrompts(dataset, "text").load()
    with pytest.raises(UserError, match=r"row 1: prompt is None"):
        HubPrompts(dataset, "word").load()
    with pytest.raises(UserError, match=r"cannot load prompts.dataset=.*split test"):
        HubPrompts(dataset, "caption", split="test").load()
    with pytest.raises(UserError, match=r"cannot load prompts.dataset=nobody/nothing"):
        HubPrompts("nobody/nothing", "caption").load()


def test_blank_lines_at_the_end_are_no_prompts(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n\n  \n')
    assert [prompt.text for prompt in PromptFile(str(tmp_path / "prompts.jsonl")).load()] == ["a cat", "a dog"]
