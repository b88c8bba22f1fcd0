"""A control for each field of a method. What a field allows is asked of its class, which refuses all else."""

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import gradio as gr

from h2cache import CacheConfig
from h2cache.tuning.knobs import knobs_of

LEFT_OUT = ("batch_decision",)  # a batch of one is alike for all of them


def controls(method: CacheConfig, names: Iterable[str]) -> dict[str, gr.components.Component]:
    """Field to its control, at the method's value, to be called where the controls are to stand.

    A field that holds several numbers, such as a polynomial, has none.
    """
    found = {name: _control(method, name) for name in names}
    return {name: control for name, control in found.items() if control is not None}


def fields_of(method: CacheConfig) -> tuple[list[str], list[str]]:
    """The method's fields: those that say how much is skipped, as `h2cache.tune` turns them, and the others."""
    names = [each.name for each in fields(method) if each.name not in LEFT_OUT]
    turned = {name for knob in knobs_of(method) for name in knob.fields}
    return [name for name in names if name in turned], [name for name in names if name not in turned]


def changed(method: CacheConfig, values: dict[str, Any]) -> CacheConfig:
    """The method with what its controls hold. ValueError where its class refuses that."""
    made = {name: _read(method, name, value) for name, value in values.items()}
    return method.updated(**made)


def _read(method: CacheConfig, name: str, value: Any) -> Any:
    """What a control holds, as the field has it."""
    match getattr(method, name), value:
        case bool() | str() | float(), _:
            return value
        case _, str() as text:
            if text.strip() and not text.strip().isdecimal():
                raise ValueError(f"{name}={text!r} is not allowed: it must be a whole number, or nothing for none")
            return int(text) if text.strip() else None
        case _:
            return int(value)  # a slider may send 3.0


def _control(method: CacheConfig, name: str) -> gr.components.Component | None:
    match getattr(method, name):
        case bool(value):
            return gr.Checkbox(value, label=name, interactive=True)
        case str(value):
            return gr.Dropdown(choices(method, name), value=value, label=name, interactive=True)
        case int() | float() | None as value if _allows(method, name, None):
            text = "" if value is None else str(value)  # a number's box would show an absent one as 0
            return gr.Textbox(text, label=name, placeholder="none", interactive=True)
        case int(value):
            low = next(least for least in (0, 1, value) if _allows(method, name, least))
            return gr.Slider(low, max(10, 4 * value), value, step=1, label=name, interactive=True)
        case float(value):
            step = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 0.01
            low, high = (0.0, max(0.5, 4 * value)) if _allows(method, name, 1.5) else (step, 1 - step)
            return gr.Slider(low, high, value, step=step, label=name, interactive=True)
    return None


def choices(method: CacheConfig, name: str) -> list[str]:
    """The words that a field may hold: those that the refusal of another one names, and that are not refused."""
    try:
        method.updated(**{name: ""})
    except ValueError as error:
        named = re.findall(r"'([^']+)'", str(error).partition("must be")[2])
        return [word for word in named if _allows(method, name, word)] or [getattr(method, name)]
    return [getattr(method, name)]


def _allows(method: CacheConfig, name: str, value: Any) -> bool:
    try:
        method.updated(**{name: value})
    except ValueError:
        return False
    return True
