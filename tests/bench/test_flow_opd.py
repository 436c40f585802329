"""bench/flow_opd.py: the picture of README."""

import numpy as np
import torch

from bench.flow_opd import grid


def test_a_grid_has_the_size_and_the_pixels_that_its_images_ask_for():
    # 10 images of 24 px, five times as large, eight a row: 8 * (120+8) + 8 wide, 2 * (120 + 62) + 8 high.
    images = torch.zeros(10, 3, 24, 24)
    images[:, 0] = torch.arange(0, 200, 20)[:, None, None] / 255  # redder and redder
    images[9, 1, 0, 23] = 1.0  # a mark in the last one's upper right corner
    found = grid(images, ["a caption"] * 10)
    assert found.size == (1032, 372)
    for i in range(10):
        assert found.getpixel((8 + i % 8 * 128 + 60, 8 + i // 8 * 182 + 60)) == (20 * i, 0, 0)
    corner = (8 + 128 + 119, 8 + 182)
    assert found.getpixel(corner) == found.getpixel((corner[0] - 4, corner[1] + 4)) == (180, 255, 0)
    assert found.getpixel((corner[0] - 5, corner[1])) == (180, 0, 0), "neither turned nor mirrored, and not blurred"
    caption = np.asarray(found)[8 + 120 + 2 : 8 + 120 + 15, 8:128]
    assert (caption < 100).any(), "the caption stands below its picture"
