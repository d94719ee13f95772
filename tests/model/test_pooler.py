"""Token merge against torch's pooling and interpolation."""

import numpy as np
import pytest
import torch

from crosslmm_jax.model.pooler import pool, pooling_weights


@pytest.mark.parametrize("side", [27, 24, 5])
@pytest.mark.parametrize("grid", [1, 3, 4])
@pytest.mark.parametrize("pooling", ["average", "bilinear", "bilinear_antialias"])
def test_poolings_equal_torch(side, grid, pooling):
    features = np.random.default_rng(side).standard_normal((2, side * side, 6)).astype(np.float32)
    image = torch.tensor(features).reshape(2, side, side, 6).permute(0, 3, 1, 2)
    if pooling == "average":
        expected = torch.nn.functional.adaptive_avg_pool2d(image, grid)
    else:
        expected = torch.nn.functional.interpolate(
            image, size=grid, mode="bilinear", align_corners=False, antialias=pooling == "bilinear_antialias"
        )
    expected = expected.permute(0, 2, 3, 1).reshape(2, grid * grid, 6).numpy()
    np.testing.assert_allclose(pool(features, grid, pooling), expected, atol=1e-6)


def test_plain_bilinear_only_picks():
    """LLaVA's pooling reads 9 of 729 tokens, so that all others are lost."""
    weights = pooling_weights(27, 3, "bilinear")
    assert np.argwhere(weights == 1).tolist() == [[0, 4], [1, 13], [2, 22]]
    assert np.count_nonzero(pooling_weights(27, 3, "average")) == 27
