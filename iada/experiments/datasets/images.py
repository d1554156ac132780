"""Image files, read by Pillow; and images as pages have them."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from iada.experiments.datasets.files import required
from iada.utils.checks import argument_error

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
SMALL = 64  # pixels a side: images up to this size are kept in memory
DEEP = 2**12, 2**16 - 1  # the brightest level of 16 bits; below it few of 256 levels are left


def open_image(path: Path, photo: bool = False) -> "Image":
    """The image of a file, decoded, as RGB; OSError naming the file where that fails.

    photo: as a person sees it: turned as its EXIF orientation says, on white where it is
    transparent, and 16-bit grey levels in 8 bits; levels that would be lost there are refused. The
    papers' data sets are read without.
    """
    Image = required("PIL.Image", "image files are read by Pillow: pip install 'iada[paper]'")
    try:
        content = path.read_bytes()
        if not content:
            raise OSError("an empty file")
        with Image.open(io.BytesIO(content)) as image:
            lost = _lost_levels(image) if photo else None
            if lost is None:
                return _as_seen(image) if photo else image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        got: object = error
        if isinstance(error, required("PIL", "").UnidentifiedImageError):  # names a buffer of ours
            got = "a file that Pillow does not know for one"
        text = argument_error(path, "an image", got, "fetch that image again")
        raise OSError(str(text)) from error
    expected, remedy = "grey levels that fill 8 or 16 bits", "scale them to 8 bits"
    raise OSError(str(argument_error(path, expected, lost, remedy)))


def _lost_levels(image: "Image") -> str | None:
    """Grey levels of which hardly any would be left in 8 bits; None where all is well."""
    if image.mode == "F":
        return "floating-point ones"
    if image.mode.startswith("I"):
        levels, (least, most) = np.asarray(image), DEEP
        low, high = int(levels.min()), int(levels.max())
        if low < 0 or 0 < high < least or high > most:
            return f"levels from {low} to {high}"
    return None


def _as_seen(image: "Image") -> "Image":
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def pixels(image: "Image") -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def data_address(image: "Image", most: int) -> str:
    """The image, at most so many pixels a side, as an address that holds it: data:image/…

    Exact up to 64 pixels a side, as PNG; else a JPEG.
    """
    image = image.copy()
    image.thumbnail((most, most))
    small = max(image.size) <= SMALL
    content = io.BytesIO()
    image.save(content, "PNG" if small else "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def scaled_part(image: "Image", box: tuple[float, float, float, float], size: int) -> Tensor:
    """A box (left, upper, right, lower) of the image, scaled: uint8 (3, size, size)."""
    from PIL.Image import Resampling

    return pixels(image.resize((size, size), Resampling.BILINEAR, box=box))


def small_images(paths: Sequence[Path], photo: bool = False) -> Tensor | None:
    """All images as one uint8 tensor (N, 3, H, W); None unless all are of one small size."""
    if not paths:
        return None
    first = open_image(paths[0], photo)
    if max(first.size) > SMALL:
        return None
    images = torch.empty((len(paths), 3, first.height, first.width), dtype=torch.uint8)
    for row, path in enumerate(paths):
        image = open_image(path, photo)
        if image.size != first.size:
            return None
        images[row] = pixels(image)
    return images
