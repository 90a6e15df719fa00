"""Pictures to look at: sheets of images with captions, and confusion matrices."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

SIDE, CAPTION = 84, 16  # pixels of an image with its margin, and of the line below it


def contact_sheet(images: Tensor, captions: Sequence[str], columns: int = 10) -> Image.Image:
    """Draw images with a caption under each.

    Args:
        images: uint8 (n, C, H, W), n > 0; C is 1 for grey, 3 for colour.
        captions: n texts of up to a dozen letters; longer ones are cut.
        columns: number of images side by side.

    Example:
        >>> contact_sheet(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), ["7", "1", "0"]).save("sheet.png")
    """
    columns = min(columns, len(images))
    mode = "L" if images.shape[1] == 1 else "RGB"
    sheet = Image.new(mode, (columns * SIDE, -(-len(images) // columns) * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (pixels, caption) in enumerate(zip(images.cpu().numpy(), captions, strict=True)):
        left, top = place % columns * SIDE, place // columns * (SIDE + CAPTION)
        image = Image.fromarray(pixels[0] if mode == "L" else np.moveaxis(pixels, 0, -1).copy())
        shrinks = max(image.size) > SIDE
        method = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
        image = ImageOps.contain(image, (SIDE - 4, SIDE - 4), method)
        sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        draw.text((left + SIDE / 2, top + SIDE + 6), caption[:16], fill="black", anchor="mm")
    return sheet


def confusion_sheet(counts: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix with a row for each true class and a column for each predicted one.

    Args:
        counts: int64 (n, n), ``counts[i, j]`` samples of class i predicted as class j.
        names: n class names.
    """
    font, margin, cell = ImageFont.load_default(14), 48, max(650 // len(counts), 4)
    # The shares of each row; their square roots, so that rare mistakes show.
    shades = (counts / counts.sum(1, keepdim=True).clamp(min=1)).sqrt()  # (n, n) in 0..1
    cells = Image.fromarray((255 * (1 - shades)).round().to(torch.uint8).numpy())
    sheet = Image.new("L", (margin + len(counts) * cell,) * 2, "white")
    sheet.paste(cells.resize((len(counts) * cell,) * 2, Image.Resampling.NEAREST), (margin, margin))
    draw = ImageDraw.Draw(sheet)
    draw.text((sheet.width / 2, 12), "predicted", 0, font, anchor="mm")
    draw.text((2, 12), "true", 0, font, anchor="lm")
    if cell < 20:
        return sheet  # no room for numbers
    centres = [margin + (place + 0.5) * cell for place in range(len(counts))]
    for centre, name in zip(centres, names, strict=True):
        draw.text((centre, margin - 14), name[: cell // 9], 0, font, anchor="mm")
        draw.text((margin / 2, centre), name[:5], 0, font, anchor="mm")
    for y, row, row_shades in zip(centres, counts.tolist(), shades.tolist(), strict=True):
        for x, count, shade in zip(centres, row, row_shades, strict=True):
            draw.text((x, y), str(count), 255 if shade > 0.5 else 0, font, anchor="mm")
    return sheet
