"""The norm of a tile and its gradient, for the kernels.

A tile (BLOCK_N, BLOCK_D) has a token's vectors of n sub-layers, D values each; the rest of it is padding.

Source: LayerNorm, arXiv 1607.06450; RMSNorm, arXiv 1910.07467. With r the reciprocal deviation, y = (x - mean) r and g
the gradient of y:  dx = r (g - mean(g y) y - mean(g)),  without the last term in RMSNorm, whose mean is taken as 0.
"""

import triton
import triton.language as tl


@triton.jit
def moments(x, mask, epsilon, D: tl.constexpr, CENTER: tl.constexpr):
    """The mean and the reciprocal deviation of each vector, (BLOCK_N, 1). `x` is 0 in the padding."""
    mean = tl.sum(x, axis=1, keep_dims=True) / D if CENTER else tl.sum(x, axis=1, keep_dims=True) * 0.0
    centered = tl.where(mask, x - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centered * centered, axis=1, keep_dims=True) / D + epsilon)
    return mean, 1.0 / deviation


@triton.jit
def load_moments(mean_pointer, reciprocal_pointer, token, tokens, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a forward pass has stored of a token's vectors, (n, tokens) each -> (BLOCK_N, 1) each.

    They are loaded as vectors: a tile of one column would be loaded again by each thread of a row.
    """
    rows = tl.arange(0, BLOCK_N)
    place = rows * tokens + token
    mean = tl.load(mean_pointer + place, rows < N, other=0.0)
    reciprocal = tl.load(reciprocal_pointer + place, rows < N, other=0.0)
    return mean[:, None], reciprocal[:, None]


@triton.jit
def norm_gradient(normed, gradient, reciprocal, D: tl.constexpr, CENTER: tl.constexpr):
    """The gradient of x, from y and the gradient of y, both 0 in the padding."""
    projection = tl.sum(gradient * normed, axis=1, keep_dims=True) / D
    change = gradient - projection * normed
    if CENTER:
        change -= tl.sum(gradient, axis=1, keep_dims=True) / D
    return change * reciprocal
