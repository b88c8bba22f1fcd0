"""What a configuration's `_target_` makes, and the one sentence for one that makes nothing."""

import pytest

from h2cache import H2CacheConfig
from h2cache.eval.errors import UserError
from h2cache.eval.experiments.targets import made


def test_it_is_made_with_its_fields():
    assert made("here", {"_target_": "h2cache.H2CacheConfig", "tau1": 0.3}) == H2CacheConfig(tau1=0.3)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "h2cache.eval.report.figures.Nothing",
            "there is no h2cache.eval.report.figures.Nothing; choose from Banner, ",
        ),
        ("nobody.has.this", "there is no nobody.has.this: its module cannot be imported"),
        ("eval.report.figures.Frontier2", "there is no eval.report.figures.Frontier2; write h2cache.eval.report"),
    ],
)
def test_a_wrong_class_is_one_sentence_that_ends(target, words, caplog):
    """And nothing is logged beside it: Hydra's own look-up logs three lines."""
    with pytest.raises(UserError) as error:
        made("table1: outputs", {"_target_": target})
    assert words in str(error.value) and not str(error.value).endswith(":")
    assert caplog.records == []


def test_a_class_that_cannot_do_what_it_is_for_is_refused():
    assert made("here", {"_target_": "h2cache.eval.report.tables.SummaryTable", "title": "All"}, "make").title == "All"
    with pytest.raises(UserError, match=r"^table1: outputs: .*OrderedDict is not allowed: it must be .* make\(\)$"):
        made("table1: outputs", {"_target_": "collections.OrderedDict"}, "make")


def test_an_error_without_words_is_named():
    with pytest.raises(UserError, match=r"^here: .*refuses raises AssertionError$"):
        made("here", {"_target_": f"{__name__}.refuses"})


def refuses() -> None:
    raise AssertionError
