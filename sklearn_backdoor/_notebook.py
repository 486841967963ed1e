"""What estimators and triggers look like in a notebook."""

import base64
import io
from html import escape

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import estimator_html_repr

from sklearn_backdoor._text import printable

_SIDE = 96  # pixels of a picture on the screen, at least
_MOST = 20  # classes that are named, or pictures
_FACTS = {
    "verdict_": "verdict",
    "target_classes_": "target classes",
    "target_class_": "target class",
    "feature_layer_": "features from",
    "threshold_": "threshold",
    "classes_": "classes",
    "image_shape_": "images",
}
_OF_FIGURE = (
    "display:inline-block;margin:0 1em .6em 0;text-align:center;vertical-align:top;"
    "font-size:small"
)
_OF_PICTURE = "image-rendering:pixelated;outline:1px solid #888"


class NotebookMixin:
    """Show an estimator by the network's name and what was found, not by weights."""

    def __repr__(self, N_CHAR_MAX=700):
        return BaseEstimator.__repr__(_readable(self), N_CHAR_MAX)

    def _html_repr(self):
        return f"{_found_html(self)}{estimator_html_repr(self)}"

    def _get_params_html(self, deep=True, doc_link=""):
        params = super()._get_params_html(deep, doc_link)  # type: ignore[misc]
        params.data = {name: _readable(value) for name, value in params.items()}
        return params


class _Text:
    """Prints as a text without quotes."""

    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text


class _Shown(BaseEstimator):
    """Stands for an estimator when scikit-learn prints it."""

    def __init__(self, estimator):
        self.shown = {
            name: _readable(value)
            for name, value in estimator.get_params(deep=False).items()
        }
        self.__init__ = estimator.__init__  # type: ignore  # defaults are not printed

    def get_params(self, deep=True):
        return self.shown


def _readable(value):
    """Return what to print in the place of networks, and of what holds one."""
    if isinstance(value, NotebookMixin):
        return type(type(value).__name__, (_Shown,), {})(value)
    if hasattr(value, "named_parameters") or hasattr(value, "module_"):
        return _Text(describe_network(value))
    if type(value) in (list, tuple):  # the engineers of AutoReverseEngineer
        return type(value)(map(_readable, value))
    return value


def describe_network(net):
    """Return the class and the size of a network, or of a skorch net's.

    Parameters
    ----------
    net : torch.nn.Module or fitted skorch.NeuralNet

    Returns
    -------
    str
    """
    if isinstance(net, type):
        return repr(net)
    module = getattr(net, "module_", net)
    n_parameters = sum(parameter.numel() for parameter in module.parameters())
    name = printable(type(module).__name__)
    if module is not net:
        name = f"{type(net).__name__} of {name}"
    return f"{name} ({n_parameters:,} weights)"


def _found_html(estimator):
    """Return a table of what was found, and the triggers' pictures."""
    facts = []
    net = getattr(estimator, "net", getattr(estimator, "victim", None))
    net = getattr(net, "net", net)
    if hasattr(net, "named_parameters") or hasattr(net, "module_"):
        facts.append(("network", describe_network(net)))
    for name, text in _FACTS.items():
        if hasattr(estimator, name):
            facts.append((text, _said(getattr(estimator, name))))
    rows = "".join(
        f"<tr><th style='text-align:left'>{text}</th>"
        f"<td style='text-align:left'>{escape(printable(said, 400))}</td></tr>"
        for text, said in facts
    )
    triggers = _triggers_of(estimator)
    pictures = "".join(picture_html(trigger, text) or "" for text, trigger in triggers)
    return f"<div><table>{rows}</table>{pictures}</div>" if rows + pictures else ""


def _said(value):
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        more = [f"and {len(value) - _MOST} more"] if len(value) > _MOST else []
        return ", ".join([*map(str, value[:_MOST]), *more]) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)


def _triggers_of(estimator):
    """Return pairs of a caption and a trigger."""
    triggers = getattr(estimator, "triggers_", None)
    if triggers is None:
        trigger = getattr(estimator, "trigger_", getattr(estimator, "trigger", None))
        return [("trigger", trigger)] if hasattr(trigger, "to_image") else []
    if isinstance(triggers, dict):
        pairs = list(triggers.items())
    else:
        pairs = list(zip(estimator.classes_.tolist(), triggers, strict=True))
    return [(f"to class {label}", trigger) for label, trigger in pairs[:_MOST]]


def png_of(trigger):
    """Return a trigger's picture as a PNG file, enlarged; None where there is none.

    Parameters
    ----------
    trigger : Trigger

    Returns
    -------
    bytes or None
    """
    from PIL import Image  # pictures are for those who look

    if len(trigger.image_shape) != 3:
        return None
    pixels = np.rint(255 * trigger.to_image()).astype(np.uint8)
    times = -(-_SIDE // min(pixels.shape[:2]))
    pixels = pixels.repeat(times, axis=0).repeat(times, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def picture_html(trigger, caption):
    """Return a trigger's picture as HTML; None where there is none.

    Parameters
    ----------
    trigger : Trigger
    caption : str
        Of unknown origin.

    Returns
    -------
    str or None
    """
    png = png_of(trigger)
    if png is None:
        return None
    data = base64.b64encode(png).decode()
    text = escape(printable(caption, 200))
    return (
        f'<figure style="{_OF_FIGURE}"><img alt="{text}" width="{_SIDE}" '
        f'style="{_OF_PICTURE}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
