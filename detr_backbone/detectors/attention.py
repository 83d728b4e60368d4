"""Multi-head attention of the detectors' layers, in eager mode and in exported graphs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the values [B, Q, C] that `query` reads.

    While torch exports, the same is spelled out in operators that serve every batch size: the forward of the module
    specialises a graph to one image or to more.

    Args:
        attention: built with `batch_first=True`, and with keys and values as wide as queries.
        query: [B, Q, C].
        key: [B, S, C].
        value: [B, S, C].
        padding: bool [B, S], True on keys that no query attends to.
        mask: bool [B, Q, S], True where a query does not attend to a key.

    >>> attention, tokens = nn.MultiheadAttention(8, num_heads=2, batch_first=True), torch.zeros(1, 5, 8)
    >>> attend(attention, tokens[:, :3], tokens, tokens).shape
    torch.Size([1, 3, 8])
    """
    if not torch.compiler.is_exporting():
        # Without weights torch takes its fused kernel. A forward pre-hook with kwargs can ask for them all the same.
        of_heads = None if mask is None else mask.repeat_interleave(attention.num_heads, dim=0)
        return attention(query, key, value, key_padding_mask=padding, need_weights=False, attn_mask=of_heads)[0]
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, weight, bias).view(*x.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    allowed = None if padding is None else ~padding[:, None, None]
    if mask is not None:
        allowed = ~mask[:, None] if allowed is None else allowed & ~mask[:, None]
    dropout = attention.dropout if attention.training else 0.0
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    return attention.out_proj(heads.transpose(1, 2).flatten(2))
