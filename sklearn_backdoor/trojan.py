"""Trojan triggers: content optimised to drive chosen neurons (SQ and WM, §5.1)."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from sklearn_backdoor._exclusive import evaluation_mode
from sklearn_backdoor._forward import device_of, layer_names
from sklearn_backdoor._torch import torch_generator
from sklearn_backdoor._validation import check_number
from sklearn_backdoor.triggers import PatchTrigger, square_mask


def trojan_square(network, image_shape, *, size=None, margin=1, **options):
    """SQ: a square whose content drives neurons of a network.

    Parameters
    ----------
    network : torch.nn.Module
        The victim-to-be or another network; not altered.
    image_shape : tuple (n_channels, height, width)
    size : int, default=None
        Side in pixels; None takes a quarter of the image's shorter side.
    margin : int, default=1
        Pixels to the bottom right edges.
    **options
        Of `optimise_content`.

    Returns
    -------
    PatchTrigger

    References
    ----------
    Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang: Trojaning attack on neural networks. NDSS
    2018, §III.
    """
    if size is None:
        size = max(1, min(image_shape[-2:]) // 4)
    mask = square_mask(image_shape, size, margin)
    return optimise_content(network, mask, image_shape, **options)


def trojan_watermark(network, image_shape, *, text="TROJAN", opacity=1.0, **options):
    """WM: a watermark, drawn from text, whose content drives neurons of a network.

    Parameters
    ----------
    network : torch.nn.Module
        The victim-to-be or another network; not altered.
    image_shape : tuple (n_channels, height, width)
    text : str, default="TROJAN"
        Drawn as wide as the image, over its middle.
    opacity : float in 0...1, default=1.0
        Of the strokes.
    **options
        Of `optimise_content`.

    Returns
    -------
    PatchTrigger

    References
    ----------
    Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang: Trojaning attack on neural networks. NDSS
    2018, §III.
    """
    check_number(opacity, "opacity", 0, 1)
    mask = opacity * text_mask(text, image_shape[-2:])
    return optimise_content(network, mask, image_shape, **options)


def text_mask(text, shape):
    """Draw text as wide as an image, over its middle.

    Parameters
    ----------
    text : str
        What is drawn, in Pillow's own font.
    shape : tuple (height, width)
        Pixels.

    Returns
    -------
    ndarray of shape (height, width), float64 in 0...1

    Raises
    ------
    ValueError
        If the text leaves no mark.
    """
    height, width = shape
    font = ImageFont.load_default(64)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    if right <= left or bottom <= top:
        raise ValueError(f"text={text!r} draws nothing: give at least one letter.")
    drawing = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(drawing).text((-left, -top), text, fill=255, font=font)
    scale = min(width / drawing.width, height / drawing.height)
    size = tuple(max(1, round(side * scale)) for side in drawing.size)
    canvas = Image.new("L", (width, height))
    place = ((width - size[0]) // 2, (height - size[1]) // 2)
    canvas.paste(drawing.resize(size, Image.Resampling.LANCZOS), place)
    return np.asarray(canvas) / 255


def optimise_content(
    network,
    mask,
    image_shape,
    *,
    layer=None,
    n_neurons=1,
    activation=100.0,
    n_steps=200,
    lr=0.05,
    random_state=0,
):
    """Optimise the pixels under a mask so that chosen neurons reach an activation.

    Parameters
    ----------
    network : torch.nn.Module
        In evaluation mode while it works, then as before.
    mask : ndarray of shape (height, width) in 0...1
        Where the trigger lies.
    image_shape : tuple (n_channels, height, width)
    layer : str, default=None
        Name of an ``nn.Linear`` or ``nn.Conv2d``; None takes the last but one, the
        hidden layer before the logits.
    n_neurons : int, default=1
        How many neurons (or channels) are driven: those with the largest sum of
        absolute incoming weights.
    activation : float, default=100.0
        Value to reach, before the nonlinearity.
    n_steps : int, default=200
        Steps of Adam.
    lr : float, default=0.05
        Step in pixels on the 0...1 scale.
    random_state : int, RandomState instance or None, default=0
        Initial pixels.

    Returns
    -------
    PatchTrigger

    Raises
    ------
    ValueError
        If the layer does not exist or has no weights of this kind.

    Notes
    -----
    The rest of the image is black, and pixels are kept in 0...1 by clipping. Of a
    convolution, the mean over positions is driven.
    """
    module = _weighted_layer(network, layer)
    strength = module.weight.detach().abs().flatten(1).sum(1)
    neurons = strength.topk(min(n_neurons, len(strength))).indices
    device = device_of(network)
    generator = torch_generator(random_state)
    cover = torch.as_tensor(np.asarray(mask), dtype=torch.float32, device=device)
    pixels = torch.rand(image_shape, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=lr)
    caught: list = []

    def catch(layer, inputs, output):
        caught[:] = [output]

    with evaluation_mode(network), torch.enable_grad():
        handle = module.register_forward_hook(catch)
        try:
            for _ in range(n_steps):
                network((cover * pixels)[None])
                driven = (
                    caught[0].flatten(2).mean(2) if caught[0].ndim > 2 else caught[0]
                )
                loss = ((activation - driven[0, neurons]) ** 2).sum()
                (pixels.grad,) = torch.autograd.grad(loss, pixels)
                optimizer.step()
                with torch.no_grad():
                    pixels.clamp_(0, 1)
        finally:
            handle.remove()
    return PatchTrigger(mask, pixels.detach().cpu().numpy())


def _weighted_layer(network, layer):
    if layer is None:
        found = [
            module
            for module in network.modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        ]
        if len(found) < 2:
            raise ValueError(
                "the network has no hidden nn.Linear or nn.Conv2d whose neurons could "
                f"be driven; name one with layer=... (it has: {layer_names(network)})."
            )
        return found[-2]
    module = dict(network.named_modules()).get(layer)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"layer={layer!r} is no nn.Linear or nn.Conv2d of the network. Choose one "
            f"of: {layer_names(network)}."
        )
    return module
