"""Photographs to calibrate on and to look at: those that scikit-image and scikit-learn ship.

Each photograph is cut into random crops; the crops used for calibration and the held-out crops come
from different random draws, so no crop is in both. (Both draws see the same photographs.)
"""

from __future__ import annotations

import numpy as np
import skimage.data
import sklearn.datasets
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

SIZE = 224
ALL = slice(None)


def photographs() -> dict[str, NDArray[np.uint8]]:
    """Name -> RGB image, (height, width, 3) uint8."""
    grey_or_rgb = {
        "astronaut": skimage.data.astronaut(),
        "brick": skimage.data.brick(),
        "camera": skimage.data.camera(),
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "coins": skimage.data.coins(),
        "grass": skimage.data.grass(),
        "gravel": skimage.data.gravel(),
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "rocket": skimage.data.rocket(),
        "temple": sklearn.datasets.load_sample_image("china.jpg"),
        "flower": sklearn.datasets.load_sample_image("flower.jpg"),
    }
    return {
        name: image if image.ndim == 3 else np.repeat(image[..., None], 3, 2) for name, image in grey_or_rgb.items()
    }


def preprocess(image: NDArray[np.uint8], size: int = SIZE) -> Tensor:
    """(height, width, 3) uint8 -> (1, 3, size, size) float32 as EfficientNet-Lite was trained: (x - 127) / 128."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(torch.float32)
    x = interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return (x.clamp(0, 255) - 127) / 128


def centre(image: NDArray[np.uint8]) -> Tensor:
    """The largest central square of a photograph, preprocessed."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return preprocess(image[top : top + side, left : left + side])


def crops(count: int, seed: int, size: int = SIZE, which: slice = ALL) -> list[Tensor]:
    """`count` random square crops, half of them mirrored, taking the photographs (or `which` of them) in turn."""
    rng = np.random.default_rng(seed)
    images = list(photographs().values())[which]
    result = []
    for index in range(count):
        image = images[index % len(images)]
        shortest = min(image.shape[:2])
        side = int(rng.integers(shortest // 3, shortest + 1))
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in image.shape[:2])
        crop = image[top : top + side, left : left + side]
        result.append(preprocess(crop[:, ::-1] if rng.random() < 0.5 else crop, size))
    return result
