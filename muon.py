"""Muon: momentum whose matrices, of blocks and encoders, are made orthogonal; AdamW for everything else.

    m <- mu m + (1 - mu) g'                          g': the gradient after surgery and clipping
    o  = NS(mu m + (1 - mu) g')                      Nesterov's look ahead; o: near U V^T of the SVD U S V^T
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(r, c)) o    W (r, c): q, k and v each by itself

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The factor before o is Liu et al.'s (2025,
arXiv 2502.16982, section 2.2): updates then have the root mean square of AdamW's, and one learning rate does
for both. A step is quick because the matrices lie at the end of the flat vectors, those of one shape together
(model.flat_order): each shape is one batch of products. Used by surgery.py and teacher.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.project import project_adamw
from model import DecisionTransformer

# of x <- a x + b (x x^T) x + c (x x^T)^2 x: Jordan et al.'s, steep at 0, near 1 from 0.7 to 1.2
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5
RMS = 0.2  # of an update's entries, at a learning rate of 1

Shapes = Sequence[tuple[int, int, int]]  # (n, r, c) of each batch of matrices; none: AdamW alone


def shapes(model: DecisionTransformer) -> Shapes:
    """Of the batches at the end of the model's flat parameters: q, k, v and proj; fc; out; encoders'."""
    L = model.cfg.n_layer
    C = model.cfg.n_embd
    encoders = [(1, len(w), w[0].numel()) for encoder in model.encoders for w in encoder.weights]
    return [(4 * L, C, C), (L, 4 * C, C), (L, C, 4 * C), *encoders]


def orthogonal(x: Tensor) -> Tensor:
    """x (n, r, c) -> each matrix with its singular values brought near 1, by Newton-Schulz iterations.

    In bfloat16 on a GPU, where that suffices and is fast; in float32 on a CPU, where bfloat16 may be slow.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    dtype = x.dtype
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    elif x.shape[1] < x.shape[2]:
        return _by_gram(x)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(dtype)


def _by_gram(x):
    """The same, of wide x in fewer and smaller products: what multiplies x comes of its Gram matrix alone.

    x_k = q_k x and x_k x_k^T = q_k (x x^T) q_k: all of (n, r, r). Its rounding errors grow with the square of
    the condition number, too fast for bfloat16.
    """
    gram = x @ x.mT
    product = None
    for a, b, c in COEFFICIENTS:
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        product = q if product is None else q @ product
        gram = q @ gram @ q
    return product @ x


def step(
    theta: Tensor,
    g: Tensor,
    u: Tensor | None,
    m: Tensor,
    v: Tensor,
    *,
    schedule: Tensor,
    alive: Tensor,
    shapes: Shapes = (),
    weight_decay: float = 0.0,
    **options,
) -> Tensor:
    """One update in place; arguments, options and result (5,) as in kernels.project.project_adamw_ref.

    Of the matrices at the end, m is the momentum, and v what is made orthogonal.
    """
    start = len(g) - sum(map(math.prod, shapes))
    options |= {"weight_decay": weight_decay, "n_adamw": start}
    stats = project_adamw(theta, g, u, m, v, schedule, alive, **options)
    lr = schedule[0] * alive
    for shape in shapes:
        part = slice(start, start + math.prod(shape))
        W = theta.data[part].view(shape)
        o = orthogonal(v[part].view(shape))
        W.mul_(1 - lr * weight_decay).sub_(lr * RMS * math.sqrt(max(shape[1:])) * o)
        start = part.stop
    return stats
