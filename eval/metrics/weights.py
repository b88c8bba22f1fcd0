"""Where the weights of learned metrics come from: the folder `metric_weights=`, a cache, or the network.

docs/metrics.md says which files the folder may hold.
"""

import contextlib
import io
import socket
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from h2cache.eval.errors import UserError
from h2cache.eval.metrics.metric import Unavailable

# Seconds without an answer: pyiqa, clip and torch.hub would wait for ever.
FETCH_TIMEOUT, PROBE_TIMEOUT = 10.0, 3.0
Loaded = TypeVar("Loaded")


def is_online() -> bool:
    """Whether the hub that has most of the weights answers at all; False where the environment forbids to ask it."""
    if constants.is_offline_mode():
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def loaded(name: str, local: Sequence[Path], online: bool, load: Callable[[], Loaded]) -> Loaded:
    """What `load` returns.

    Args:
        name: of the metric, for the errors.
        local: the files or folders that it loads, of the user's; none: it looks into caches and asks the network.
        online: if not, the network is given up at once.
        load: prints and warns as it likes, nobody sees it.

    Raises:
        Unavailable: it failed; the message says why in one sentence.
        UserError: it failed on the user's own files.
    """
    try:
        with _quietly(), _patience(online):
            return load()
    except Exception as error:  # hubs, archives and optional packages fail in more ways than can be listed
        if local and not isinstance(error, ImportError):
            files = ", ".join(path.name for path in local)
            raise UserError(
                f"metric_weights={local[0].parent}: {files} cannot be loaded as the weights of {name} "
                f"({first_line(error)}); fetch it again (docs/metrics.md), or take it out of the folder"
            ) from error
        raise Unavailable(why_not_loaded(error, online)) from error


def why_not_loaded(error: Exception, online: bool) -> str:
    """One short sentence."""
    if isinstance(error, ModuleNotFoundError) and error.name == "pkg_resources":
        return "openai-clip needs pkg_resources, which setuptools 82 dropped: pip install 'setuptools<82'"
    if isinstance(error, ImportError):
        return f"a package is missing ({first_line(error)})"
    if not online and _is_of_network(error):
        return "its weights are not in the local cache, and there is no network to fetch them"
    return f"its weights cannot be loaded ({first_line(error)})"


def first_line(error: Exception) -> str:
    """What the error says first, or its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_of_network(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is a failure to reach another machine."""
    return error is not None and (
        isinstance(error, (urllib.error.URLError, ConnectionError, TimeoutError, LocalEntryNotFoundError))
        or _is_of_network(error.__cause__ or error.__context__)
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Neither prints nor warnings; the bar of a download, on stderr, stays."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _patience(online: bool) -> Iterator[None]:
    """An end to waiting for sockets, none of whose users here takes a timeout of its own; and, if not `online`, none of
    the hub client's retries, which would take most of a minute for each file."""
    timeout, offline = socket.getdefaulttimeout(), constants.HF_HUB_OFFLINE
    socket.setdefaulttimeout(FETCH_TIMEOUT if online else PROBE_TIMEOUT)
    constants.HF_HUB_OFFLINE = offline or not online
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        socket.setdefaulttimeout(timeout)
