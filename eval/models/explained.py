"""Why a model did not load, in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from h2cache.eval.errors import UserError


@contextmanager
def explained(source: str, kind: str, field: str) -> Iterator[None]:
    """Turn what loading `source`, which should be a `kind`, raises into a UserError: `model.field=` gives another."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # the caller knows what to advise
    except Exception as error:  # what a hub or a half-copied folder can raise is nobody's closed list
        raise UserError(_why_not_loaded(source, kind, field, error)) from error


def _why_not_loaded(source: str, kind: str, field: str, error: Exception) -> str:
    """One sentence: diffusers wraps the hub's errors in its own, so the reason is somewhere down the chain."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    reason = str(chain[-1]).strip().split("\n")[0]
    if Path(source).exists():
        return f"{source} does not load as {kind} ({reason}); is it complete?"
    if any(isinstance(each, GatedRepoError) for each in chain):
        page = "https://huggingface.co/" + "/".join(source.split("/")[:2])
        return (
            f"{source} needs its licence accepted at {page} and a login (`hf auth login`); "
            "without them use model=flux-mini"
        )
    if any(isinstance(each, RepositoryNotFoundError) for each in chain):
        return f"{source}: the hub has no such repository, or hides it until `hf auth login`"
    if not any(isinstance(each, OSError) for each in chain):
        return f"{source} does not load as {kind} ({reason}); see python run.py doctor=true for what is installed"
    return (
        f"cannot fetch {source} from the hub, and it is not in the local cache ({reason}): check the network, "
        f"or give a copy with model.{field}=, or use model=flux-mini"
    )
