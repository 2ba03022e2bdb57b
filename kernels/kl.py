"""KL divergence between diagonal Gaussian policies, summed per teacher.

    KL(N(m, s) || N(n, t)) = log(t / s) + (s^2 + (m - n)^2) / (2 t^2) - 1/2        per action dimension

Called by distill.py, where student and teacher are the two Gaussians and a batch mixes windows of any of N teachers.
"""

import torch

DIRECTIONS = ("reverse", "forward")  # reverse: KL(student || teacher), the proposal's; forward: KL(teacher || student), Rusu et al.'s


def divergence(mean, log_std, t_mean, t_log_std, direction="reverse", sigma_floor=0.0, temperature=1.0):
    """Elementwise KL between student (mean, log_std) and teacher (t_mean, t_log_std), any common shape.

    sigma_floor: added to both variances as sigma_floor^2, so that no teacher is infinitely sharp (an action on its bounds has
    a collapsing sigma, and the KL grows as 1 / sigma^2). temperature multiplies the teacher's sigma (Hinton et al. 2015, arXiv 1503.02531).
    """
    var = (2 * log_std).exp() + sigma_floor**2
    t_var = (2 * t_log_std).exp() * temperature**2 + sigma_floor**2
    if direction == "forward":
        var, t_var = t_var, var
    # not 0.5 * (ratio - 1 - log(ratio)) with ratio = var / t_var: near 1 that cancels in float32, log1p does not
    x = (var - t_var) / t_var
    return 0.5 * (x - torch.log1p(x) + (mean - t_mean).square() / t_var)


def per_teacher(x, mask, task, act_dims):
    """x (B, K, A) elementwise, mask (B, K) bool, task (B,), act_dims (N,) -> sums (N,) of x over a token's real action dimensions
    divided by their number, and counts (N,) of valid tokens."""
    A, N = act_dims[task], len(act_dims)  # (B,)
    real = torch.arange(x.shape[-1], device=x.device) < A[:, None]  # (B, A)
    x = x.masked_fill(~(mask[..., None] & real[:, None, :]), 0.0).sum((1, 2)) / A  # (B,)
    sums = torch.zeros(N, dtype=x.dtype, device=x.device).index_add(0, task, x)
    counts = torch.zeros(N, dtype=x.dtype, device=x.device).index_add(0, task, mask.sum(1).to(x.dtype))
    return sums, counts


def gaussian_kl_ref(mean, log_std, t_mean, t_log_std, mask, task, act_dims, direction="reverse", sigma_floor=0.0, temperature=1.0):
    """Student and teacher, each (B, K, A), padded to the widest action; mask (B, K); task (B,): whose window; act_dims (N,).

    Returns sums (N,) of the KL per action dimension over each teacher's valid tokens, and counts (N,) of those tokens:
    L_i = sums[i] / counts[i]. What is masked or beyond a teacher's action size changes nothing.
    """
    return per_teacher(divergence(mean, log_std, t_mean, t_log_std, direction, sigma_floor, temperature), mask, task, act_dims)


def gaussian_kl(mean, log_std, t_mean, t_log_std, mask, task, act_dims, direction="reverse", sigma_floor=0.0, temperature=1.0):
    """KL per teacher; arguments as in gaussian_kl_ref, which it takes everywhere: there is no fused kernel yet."""
    return gaussian_kl_ref(mean, log_std, t_mean, t_log_std, mask, task, act_dims, direction, sigma_floor, temperature)
