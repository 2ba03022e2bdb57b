"""Causal self-attention over Decision Transformer sequences with a padding mask.

    softmax(q k^T / sqrt(hs) + causal and padding mask) v        per (batch, head)

Called by model.Block. A padded token attends to nothing, is attended to by nothing, and its output is 0, so a row without
any valid token is all zeros. Plain matrix products and a softmax: every step has a forward-mode rule, which PyTorch's
fused attentions lack and surgery's alignments need.
"""

import torch
import torch.nn.functional as F


def attention_ref(qkv, mask, n_head: int, dropout: float = 0.0):
    """qkv (B, T, 3C) packed, mask (B, T) bool, True where valid -> (B, T, C). dropout: probability on the attention weights."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
    s = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, nh, T, T)
    causal = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()
    s = s.masked_fill(~(causal & mask[:, None, None, :]), torch.finfo(s.dtype).min)
    p = F.dropout(s.softmax(-1), dropout) if dropout > 0 else s.softmax(-1)
    y = (p @ v).transpose(1, 2).reshape(B, T, C3 // 3)
    return y.masked_fill(~mask[..., None], 0.0)


def attention(qkv, mask, n_head: int, dropout: float = 0.0):
    """Causal attention; shapes as in attention_ref, which it takes everywhere: there is no fused kernel yet."""
    return attention_ref(qkv, mask, n_head, dropout)
