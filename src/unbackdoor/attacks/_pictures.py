"""Picture files that attackers use as triggers."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unbackdoor._data.decoding import decode
from unbackdoor._errors import UnbackdoorError


def picture(path: str, owner: str, shape: tuple[int, int, int], also: str) -> Tensor:
    """Returns a picture file as pixels in [0, 1], resized to (channels, height, width).

    Args:
        path: path of the file.
        owner: name of the field that holds the path, for messages.
        shape: (channels, height, width).
        also: values of the field that are not files, for messages.

    Raises:
        UnbackdoorError: the file is missing or not a picture.
    """
    if not Path(path).is_file():
        raise UnbackdoorError(f"{owner} must be {also} or an image file, got {path}, which is neither.")
    channels, height, width = shape
    try:
        image = decode(path)
    except Exception:  # decoders raise whatever they like
        raise UnbackdoorError(f"{owner} must be {also} or an image file; {path} cannot be decoded.") from None
    resized = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32)) / 255
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()
