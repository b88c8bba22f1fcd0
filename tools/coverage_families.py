"""The table of docs/models.md: which method is tested on which family of transformers, and how.

Made from the tests that pytest collects, by their parameters `name` (a family of tests/families) and `method`. A test
is known by its function's name; one that is not listed here has no word in the table.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

METHODS = {
    "h2": "H2-Cache",
    "block-cache": "Block Cache",
    "teacache": "TeaCache",
    "taylorseer-stage": "TaylorSeer, stages",
    "taylorseer": "TaylorSeer, modules",
    "hicache": "HiCache",
    "clusca": "ClusCa",
}
WORDS = {
    "test_what_never_hits_gives_the_same_bits": "bits",
    "test_what_hits_computes_less_and_differs": "hits",
    "test_an_interrupted_run_leaves_nothing_behind": "runs",
    "test_a_guided_image_is_the_same_after_another_one": "guidance",
    "test_guidance_without_hits_gives_the_same_bits": "guidance",
    "test_images_of_a_batch_are_decided_as_if_alone": "batch",
    "test_block_cache_does_what_diffusers_first_block_cache_does": "diffusers",
    "test_h2_cache_does_what_a_plain_loop_does": "plain loop",
    "test_clusters_are_refused_where_no_mlp_is_the_image_s_alone": "refused",
}


def coverage(items: Iterable[Any]) -> dict[str, dict[str, set[str]]]:
    """The words that tests stand behind, by family and method, families in the order of tests/families."""
    found: dict[str, dict[str, set[str]]] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        word = WORDS.get(getattr(item, "originalname", ""))
        if word is not None and params.get("method") in METHODS:
            found.setdefault(params["name"], defaultdict(set))[params["method"]].add(word)
    return found


def table(items: Iterable[Any], families: Iterable[str]) -> str:
    """The table in Markdown: a row for each family, in this order."""
    found = coverage(items)
    order = list(dict.fromkeys(WORDS.values()))
    lines = ["| family | " + " | ".join(METHODS.values()) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for family in families:
        words = found.get(family, {})
        cells = [", ".join(sorted(words.get(method, ()), key=order.index)) or "not tested" for method in METHODS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
