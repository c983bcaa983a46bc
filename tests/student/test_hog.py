"""HOG against votes counted pixel by pixel."""

import math

import torch

from fastmae.student.hog import hog


def hog_of_a_cell(cell):
    """Histogram of one colour's cell with a border of one pixel, [10, 10]."""
    votes = [0.0] * 9
    for y in range(1, 9):
        for x in range(1, 9):
            dx = float(cell[y, x + 1] - cell[y, x - 1])
            dy = float(cell[y + 1, x] - cell[y - 1, x])
            degrees = math.degrees(math.atan2(dy, dx)) % 180
            votes[int(degrees // 20) % 9] += math.hypot(dx, dy)
    length = math.sqrt(sum(vote * vote for vote in votes))
    return [vote / length for vote in votes]


def test_hog_counts_gradient_magnitudes_by_unsigned_orientation_in_cells_of_unit_norm():
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    histograms = hog(pixels, 16)
    assert histograms.shape == (2, 9, 4 * 27)
    for cell, (top, left) in enumerate(((0, 0), (0, 8), (8, 0), (8, 8))):  # of patch 4, in row 1 and column 1
        for colour in range(3):
            bordered = pixels[1, colour, 15 + top : 25 + top, 15 + left : 25 + left]
            first = 27 * cell + 9 * colour
            expected = torch.tensor(hog_of_a_cell(bordered))
            torch.testing.assert_close(histograms[1, 4, first : first + 9], expected, atol=1e-5, rtol=1e-5)


def test_a_ramp_votes_for_its_direction_and_a_flat_image_for_none():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)
    assert torch.equal(hog(ramp, 8)[0, 0].view(3, 9).argmax(1), torch.zeros(3, dtype=torch.long))  # 0 degrees
    downwards = hog(ramp.transpose(2, 3), 8)[0, 3].view(3, 9)
    assert torch.equal(downwards.argmax(1), torch.full((3,), 4))  # 90 degrees lie in the bin from 80 to 100
    assert torch.equal(hog(torch.ones(1, 3, 16, 16), 8), torch.zeros(1, 4, 27))
    torch.testing.assert_close(hog(5 * ramp + 3, 8), hog(ramp, 8))
