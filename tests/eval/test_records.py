"""The record store: what belongs to which image, and what becomes of files that were cut short or changed."""

import errno
import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from h2cache import H2CacheConfig, PlanConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.eval.errors import UserError
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.generation.records import HASHED, Cell, Drawn, Store
from h2cache.eval.models.identity import content_hash, identity
from h2cache.eval.models.pipelines import ModelConfig

MODEL = {"weights": "sha256:0", "height": 32}
CELL = Cell(Prompt("a", "a sign", "STOP"), seed=3, steps=50, method=H2CacheConfig())
TRACE = pd.DataFrame(
    {"stage": ["structure", "detail"] * 4, "decision": "warmup warmup hit forced compute hit hit hit".split()}
)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path, MODEL)


def drawn(side: int = 16, trace: pd.DataFrame | None = TRACE) -> Drawn:
    pixels = np.random.default_rng(side).integers(256, size=(side, side, 3), dtype=np.uint8)
    times = {"text_seconds": 0.25, "denoising_seconds": 2.0, "vae_seconds": 0.5, "overhead_seconds": 0.0}
    facts = {"peak_memory_bytes": None, "computed_fraction": 0.375, "machine": "abacus", "versions": "torch 2"}
    work = {"multiply_adds": 2**40, "calls": 50, "solver": "FlowMatchEulerDiscreteScheduler"}
    return Drawn(Image.fromarray(pixels), trace=trace, **times, **facts, **work)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back(store, tmp_path):
    written = store.write(CELL, drawn())
    read = Store(tmp_path, MODEL).read(CELL)
    assert read == written
    assert names(tmp_path) == [f"{read.fingerprint}.{kind}" for kind in ("csv", "json", "png")]
    assert np.array_equal(Image.open(read.image), drawn().image)
    pd.testing.assert_frame_equal(pd.read_csv(read.trace), TRACE)
    assert (read.total_seconds, read.computed_fraction, read.machine) == (2.75, 0.375, "abacus")
    assert read.hit_rates == {"structure": 0.5, "detail": 0.75}  # a forced hit is one


def test_the_baseline_has_no_trace(store, tmp_path):
    baseline = replace(CELL, method=None)
    store.write(baseline, drawn(trace=None))
    read = store.read(baseline)
    assert (read.trace, read.hit_rates) == (None, {})
    assert names(tmp_path) == [f"{read.fingerprint}.json", f"{read.fingerprint}.png"]


OTHERS = {
    "prompt": replace(CELL, prompt=Prompt("a", "a sign.", "STOP")),
    "seed": replace(CELL, seed=4),
    "steps": replace(CELL, steps=51),
    "field": replace(CELL, method=H2CacheConfig(tau1=0.16)),
    "default field": replace(CELL, method=H2CacheConfig(batch_decision="mean")),
    "method": replace(CELL, method=BlockCacheConfig(0.12)),
    "no method": replace(CELL, method=None),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_whatever_makes_another_image_has_other_files(store, other):
    store.write(CELL, drawn())
    assert store.read(other) is None
    assert store.fingerprint(other) != store.fingerprint(CELL)


def test_another_model_has_other_files(store, tmp_path):
    store.write(CELL, drawn())
    assert Store(tmp_path, MODEL | {"height": 64}).read(CELL) is None


def test_another_format_of_records_is_not_read(store, monkeypatch):
    store.write(CELL, drawn())
    monkeypatch.setattr("h2cache.eval.generation.records.FORMAT", 10**6)
    assert store.read(CELL) is None


def test_the_name_of_a_prompt_and_the_way_a_number_is_written_make_no_other_image(store):
    store.write(replace(CELL, method=TeaCacheConfig(1, (2, 0))), drawn())
    same = replace(CELL, prompt=Prompt("b", "a sign"), method=TeaCacheConfig(1.0, (2.0, 0.0)))
    assert store.read(same) is not None


@pytest.mark.parametrize("kind", ["png", "csv", "json"])
@pytest.mark.parametrize("kept", [0, 1, 0.5, -1])
def test_a_file_that_was_cut_short_is_found_and_redone(store, tmp_path, kind, kept):
    """After no byte, one, half of them, and all but one."""
    record = store.write(CELL, drawn())
    file = tmp_path / f"{record.fingerprint}.{kind}"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert store.read(CELL) is None
    assert store.write(CELL, drawn()).image_sha256 == record.image_sha256
    assert store.read(CELL) is not None


@pytest.mark.parametrize("kind", ["png", "csv", "json"])
def test_a_file_that_is_gone_is_redone(store, tmp_path, kind):
    record = store.write(CELL, drawn())
    (tmp_path / f"{record.fingerprint}.{kind}").unlink()
    assert store.read(CELL) is None


@pytest.mark.parametrize("side", [16, 512])
@pytest.mark.parametrize("kind", ["png", "csv"])
def test_a_changed_byte_is_found(store, tmp_path, kind, side):
    """In large files, too, which are hashed only where their time says that they were touched."""
    record = store.write(CELL, drawn(side))
    assert (record.image.stat().st_size > HASHED) == (side == 512)
    file = tmp_path / f"{record.fingerprint}.{kind}"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert store.read(CELL) is None


def test_a_changed_byte_of_a_small_file_is_found_whatever_its_time_says(store):
    record = store.write(CELL, drawn())
    status, content = record.image.stat(), bytearray(record.image.read_bytes())
    content[len(content) // 2] ^= 1
    record.image.write_bytes(content)
    os.utime(record.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.read(CELL) is None


def test_a_large_image_whose_end_never_reached_the_disk_is_found(store):
    """As a power failure leaves it: size and time are right, the last blocks are zeros."""
    record = store.write(CELL, drawn(512))
    status = record.image.stat()
    with record.image.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    os.utime(record.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.read(CELL) is None


@pytest.mark.parametrize("side", [16, 512])
def test_a_copy_of_the_folder_is_as_good(store, side):
    """Other times of change, the same contents."""
    record = store.write(CELL, drawn(side))
    for path in store.folder.iterdir():
        os.utime(path, (0, 0))
    assert store.read(CELL) == record


def test_a_record_under_another_ones_name_is_not_believed(store, tmp_path):
    """Whoever renamed it."""
    record, other = store.write(CELL, drawn()), OTHERS["seed"]
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace(record.fingerprint, store.fingerprint(other)))
    assert store.read(other) is None


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"cell": 1}', b"\xff"])
def test_a_record_of_nonsense_is_none(store, tmp_path, content):
    assert store.read(CELL) is None and not store.damaged  # there is none
    (tmp_path / f"{store.fingerprint(CELL)}.json").write_bytes(content)
    assert store.read(CELL) is None and store.damaged == {store.fingerprint(CELL)}


def test_the_index_says_which_files_are_whose(store, tmp_path):
    record = store.write(CELL, drawn())
    store.write_index([("H2-Cache, a = 1", CELL)])
    (row,) = pd.read_csv(tmp_path / "index.csv").to_dict("records")
    assert row["file"] == record.image.name and row["setting"] == "H2-Cache, a = 1"
    assert (row["prompt_id"], row["seed"], row["steps"]) == (CELL.prompt.id, CELL.seed, CELL.steps)
    assert row["prompt"] == CELL.prompt.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_takes_no_more_is_one_sentence_and_keeps_what_was_there(store, tmp_path, monkeypatch, number):
    record = store.write(CELL, drawn())
    before = names(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match="run the same command again") as error:
        store.write(OTHERS["seed"], drawn())
    assert ("the disk is full" in str(error.value)) == (number != errno.EACCES)
    assert names(tmp_path) == before
    assert store.read(CELL) == record


def test_a_failure_is_noted_until_the_image_is_there(store, tmp_path):
    store.write_failure(CELL, "it was not to be")
    name = store.fingerprint(CELL)
    assert json.loads((tmp_path / f"{name}.failed.json").read_text())["error"] == "it was not to be"
    assert store.read(CELL) is None
    store.write(CELL, drawn())
    assert not (tmp_path / f"{name}.failed.json").exists()


def test_one_run_at_a_time_writes_to_a_folder(store, tmp_path):
    """Another process is refused; when the lock's owner is killed, its half-written files go and others may write."""
    said, saying = os.pipe()

    def own() -> None:
        with Store(tmp_path, {}).locked():
            os.write(saying, b"locked")
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=own)  # a fresh one would import for seconds
    process.start()
    os.close(saying)
    try:
        assert os.read(said, 6) == b"locked"
        (tmp_path / ".half.1a2b3c4d.png").touch()
        with pytest.raises(UserError, match="another run writes to"), store.locked():
            pass
    finally:
        process.kill()
        process.join()
        os.close(said)
    assert ".half.1a2b3c4d.png" in names(tmp_path)
    with store.locked():
        assert names(tmp_path) == [".lock"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="change out="), Store(tmp_path / "file/records", MODEL).locked():
        pass


def model(folder: Path, **changes: object) -> ModelConfig:
    fields = {"path": str(folder), "hub_id": None, "dtype": "float32", "device": "cpu", "offload": "none"}
    sizes = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 40}
    return ModelConfig(**(fields | sizes | changes))


def test_a_local_model_is_known_by_its_weights_and_not_by_its_place(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "vae").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "vae/weights.safetensors").write_bytes(bytes(1000))
    (second / "README.md").write_text("notes")
    assert identity(model(first)) == identity(model(second, device="auto", num_inference_steps=9))
    assert identity(model(first)) != identity(model(first, dtype="bfloat16"))
    (second / "vae/weights.safetensors").write_bytes(bytes(999) + b"1")
    assert identity(model(first)) != identity(model(second))


def test_a_hub_model_is_known_by_its_name(tmp_path):
    names = [identity(model(tmp_path, path=None, hub_id=name))["weights"] for name in ("owner/one", "owner/two")]
    assert names == ["owner/one", "owner/two"]


def test_of_large_weights_samples_count(tmp_path, monkeypatch):
    """Any change that is spread over them is seen."""
    monkeypatch.setattr("h2cache.eval.models.identity.WHOLE", 1000)
    monkeypatch.setattr("h2cache.eval.models.identity.PIECE", 10)
    weights = np.random.default_rng(0).integers(256, size=100_000, dtype=np.uint8)
    hashes = []
    for content in (weights, weights ^ 1, weights):
        (tmp_path / "weights").write_bytes(content.tobytes())
        hashes.append(content_hash(tmp_path / "weights"))
    assert hashes[0] == hashes[2] != hashes[1]


def test_methods_keep_the_names_that_stored_records_have():
    """Wherever their classes are now: records of earlier versions stay valid."""
    assert {config.record_name for config in (H2CacheConfig, PlanConfig)} == {
        "h2cache.h2.H2CacheConfig",
        "h2cache.plan.PlanConfig",
    }
    for config in (BlockCacheConfig, TeaCacheConfig, TaylorSeerConfig, HiCacheConfig, ClusCaConfig):
        file = config.__name__.removesuffix("Config").lower().replace("blockcache", "block_cache")
        assert config.record_name == f"baselines.{file}.{config.__name__}"


def test_a_field_that_was_added_counts_only_where_it_was_set():
    before = H2CacheConfig(tau1=0.1).identity()["fields"]
    assert "split" not in before and before["tau1"] == 0.1
    assert H2CacheConfig(split=0.5).identity()["fields"]["split"] == 0.5


def test_a_record_of_the_first_versions_is_read(store, tmp_path):
    """They did not count the work, nor name the solver, nor keep the time of the first drawing."""
    file = tmp_path / f"{store.write(CELL, drawn()).fingerprint}.json"
    record = json.loads(file.read_text())
    for name in ("multiply_adds", "calls", "solver", "cold_seconds"):
        del record["measured"][name]
    file.write_text(json.dumps(record))
    found = store.read(CELL)
    assert (found.multiply_adds, found.calls, found.solver, found.cold_seconds) == (None,) * 4
    assert found.denoising_seconds == 2.0


def test_another_scheduler_and_another_call_have_other_files_and_the_models_own_say_nothing(store):
    otherwise = [
        {"scheduler": "unipc"},
        {"scheduler": "euler"},
        {"call": (("height", 96),)},
        {"call": (("width", 96),)},
    ]
    names = [store.fingerprint(replace(CELL, **changes)) for changes in [{}, *otherwise]]
    assert len(set(names)) == len(names)
    # As it was before cells had either.
    assert store.fingerprint(CELL) == "b80754414bb712ad0304a512"
