"""Pictures to keypoints: where crops are taken, where points lie, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minivla.nn.image_vector import ImageVector, corner_grid

A, B = "observation.images.a", "observation.images.b"


def make(**options) -> ImageVector:
    torch.manual_seed(0)
    return ImageVector({A: (3, 64, 48), B: (3, 64, 48)}, keypoints=4, **options)


def pictures(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(2, 3, 3, 64, 48, generator=generator) for key in (A, B)}


@pytest.mark.parametrize("options", [{}, {"group_norm": True}, {"compact": True, "condition": 6}])
def test_each_camera_and_moment_has_its_own_share(options):
    encoder, batch = make(**options).eval(), pictures()
    condition = torch.randn(2, 6) if options.get("compact") else None
    out = encoder(batch, condition)
    assert out.shape == (2, 3, encoder.width)
    assert encoder.width == 2 * 2 * 4
    batch[B][1, 2] += 1
    changed = (encoder(batch, condition) != out).unflatten(-1, (2, 8)).any(dim=-1)  # (B, T, cameras)
    assert changed.nonzero().tolist() == [[1, 2, 1]]


def test_crops_are_central_in_evaluation_and_torchvisions_in_training():
    from torchvision.transforms import CenterCrop, RandomCrop

    encoder, image = make(crop=(40, 33)), pictures()[A][0]
    assert torch.equal(encoder.eval().prepare(image), CenterCrop((40, 33))(image))
    torch.manual_seed(3)
    expected = RandomCrop((40, 33))(image)
    torch.manual_seed(3)
    assert torch.equal(encoder.train().prepare(image), expected)
    drawn = [encoder.prepare(image, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*drawn)
    encoder.random_crop = False
    assert torch.equal(encoder.prepare(image), CenterCrop((40, 33))(image))


def test_a_crop_of_everything_draws_nothing():
    encoder, image = make(crop=(64, 48)).train(), pictures()[A][0]
    torch.manual_seed(3)
    assert torch.equal(encoder.prepare(image), image)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))


def test_resizing_is_torchvisions():
    from torchvision.transforms import Resize

    encoder, image = make(resize=(40, 40), crop=(36, 36)).eval(), pictures()[A][0]
    expected = Resize((40, 40))(image)[..., 2:38, 2:38]
    torch.testing.assert_close(encoder.prepare(image), expected)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (7, 10), (1, 2)])
def test_the_grid_is_upstreams(rows, columns):
    x, y = np.meshgrid(np.linspace(-1, 1, columns), np.linspace(-1, 1, rows))
    expected = torch.from_numpy(np.stack((x.ravel(), y.ravel()), axis=-1)).float()
    torch.testing.assert_close(corner_grid(rows, columns), expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("compact", [False, True])
def test_keypoints_are_drawn_where_the_network_looks(compact):
    """The middle of what the outermost cells see, shifted by the crop's corner."""
    encoder = make(crop=(64, 32), compact=compact).eval()
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    first, last = encoder.pixels(corners, (64, 48)).tolist()
    step, rows, columns = (8, 8, 4) if compact else (32, 2, 1)
    middle = 1.5 if compact else 0.0
    assert first == [8 + middle, middle]
    assert last == [8 + middle + step * (columns - 1), middle + step * (rows - 1)]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"crop_shape is \(65, 48\), the images are \(64, 48\)"):
        make(crop=(65, 48))
    with pytest.raises(ValueError, match=r"crop_shape is \(41, 40\), resize_shape is \(40, 40\)"):
        make(resize=(40, 40), crop=(41, 40))
    with pytest.raises(ValueError, match="several sizes"):
        ImageVector({A: (3, 64, 48), B: (3, 48, 64)})
    with pytest.raises(ValueError, match="use_group_norm would replace"):
        make(group_norm=True, pretrained="ResNet18_Weights.IMAGENET1K_V1")
