"""Our decoder as a PyTorch user would write it: an independent implementation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from consyn_jax.model_config import ModelConfig

LOSS_CHUNKS = 4  # of the tokens, in `FusedLoss`


class RMSNorm(nn.Module):
    """RMSNorm in the dtype of its input."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, T, N, H], in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


Mask = Tensor | BlockMask | None  # None: causal, one document a row


def document_mask(documents: Tensor) -> Tensor:
    """Which keys a query sees [B, 1, T, T], for documents numbered in each row [B, T]."""
    T = documents.shape[1]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()


def document_blocks(documents: Tensor) -> BlockMask:
    """The same for FlexAttention, which skips blocks that no query of a tile sees."""

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (documents[b, q] == documents[b, kv]) & (q >= kv)

    B, T = documents.shape
    return create_block_mask(seen, B, None, T, T, device=documents.device.type)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of [B, N, T, H], with fewer heads in `k` and `v` if they are shared."""
    shares = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=shares)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shares
    )


class FusedLoss(torch.autograd.Function):
    """Cross-entropy of a linear head that keeps no logits: chunks, and gradients at once.

    This is what Liger's fused linear cross-entropy does; compiled, its softmax is one kernel, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        narrow, tokens = weight.to(x.dtype), x.shape[0]
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        losses, dxs = [], []
        for x_n, labels_n in zip(x.chunk(LOSS_CHUNKS), labels.chunk(LOSS_CHUNKS), strict=True):
            logits = (x_n @ narrow.T).float()
            log_z = logits.logsumexp(1, keepdim=True)
            losses.append((log_z - logits.gather(1, labels_n[:, None])).sum())
            hot = torch.arange(weight.shape[0], device=x.device) == labels_n[:, None]
            dlogits = (((logits - log_z).exp() - hot.float()) / tokens).to(x.dtype)
            dxs.append(dlogits @ narrow)
            dweight = dweight + (dlogits.T @ x_n).float()
        ctx.save_for_backward(torch.cat(dxs), dweight)
        return torch.stack(losses).sum() / tokens

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dweight = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), dweight * dloss, None


class Block(nn.Module):
    """Attention and SwiGLU; one matmul for queries, keys and values, one for gate and up."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.attention_norm = RMSNorm(c.hidden_dim, c.norm_eps)
        self.mlp_norm = RMSNorm(c.hidden_dim, c.norm_eps)
        self.qkv = nn.Linear(
            c.hidden_dim, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, bias=False
        )
        self.o = nn.Linear(c.num_heads * c.head_dim, c.hidden_dim, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity() for _ in range(2)
        )
        self.gate_up = nn.Linear(c.hidden_dim, 2 * c.mlp_dim, bias=False)
        self.down = nn.Linear(c.mlp_dim, c.hidden_dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(self.attention_norm(x)).view(B, T, -1, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = attend(q, k, v, mask)
        x = x + self.o(out.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """The mean loss per token of ids and labels [B, T]."""

    def __init__(self, c: ModelConfig, device: str) -> None:
        super().__init__()
        assert c.sliding_window is None
        with torch.device(device):
            self.embedding = nn.Embedding(c.vocab_size, c.hidden_dim)
            self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
            self.norm = RMSNorm(c.hidden_dim, c.norm_eps)
            self.head = nn.Linear(c.hidden_dim, c.vocab_size, bias=False)
            if c.tie_embeddings:
                self.head.weight = self.embedding.weight
            angles = torch.outer(
                torch.arange(c.context).float(),
                c.rope_theta ** (-torch.arange(0, c.head_dim, 2).float() / c.head_dim),
            )
            self.register_buffer("cos", angles.cos()[:, None], persistent=False)
            self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(
        self, ids: Tensor, labels: Tensor, mask: Mask = None, fused_loss: bool = False
    ) -> Tensor:
        x = self.embedding(ids)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream is narrow, too
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        x = self.norm(x)
        if fused_loss:
            return FusedLoss.apply(x.flatten(0, 1), self.head.weight, labels.flatten())
        logits = self.head(x)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    @property
    def matrices(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """The matrices inside the blocks, and the lengths of their parts."""
        found: list[tuple[nn.Parameter, tuple[int, ...]]] = []
        for block in self.blocks:
            keys, ffn = block.kv_heads * block.head_dim, block.down.in_features
            found += [
                (block.qkv.weight, (block.heads * block.head_dim, keys, keys)),
                (block.o.weight, (block.o.out_features,)),
                (block.gate_up.weight, (ffn, ffn)),
                (block.down.weight, (block.down.out_features,)),
            ]
        return found

    def to_fp8(self) -> Decoder:
        """Compute the matmuls of the blocks in 8 bits, by torchao.

        Raises:
            ModuleNotFoundError: torchao is not installed.
        """
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig(emulate=self.head.weight.device.type == "cpu")
        convert_to_float8_training(
            self, config=config, module_filter_fn=lambda _, name: name.startswith("blocks.")
        )
        return self

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Load weights in the Hugging Face layout; all of them must have a place here."""
        left = dict(weights)

        def put(parameter: Tensor, *names: str) -> None:
            parameter.copy_(torch.cat([left.pop(f"{name}.weight") for name in names]))

        put(self.embedding.weight, "model.embed_tokens")
        put(self.norm.weight, "model.norm")
        if self.head.weight is not self.embedding.weight:
            put(self.head.weight, "lm_head")
        for number, block in enumerate(self.blocks):
            layer = f"model.layers.{number}"
            put(block.attention_norm.weight, f"{layer}.input_layernorm")
            put(block.mlp_norm.weight, f"{layer}.post_attention_layernorm")
            put(block.qkv.weight, *(f"{layer}.self_attn.{name}_proj" for name in "qkv"))
            put(block.o.weight, f"{layer}.self_attn.o_proj")
            if isinstance(block.q_norm, RMSNorm):
                put(block.q_norm.weight, f"{layer}.self_attn.q_norm")
                put(block.k_norm.weight, f"{layer}.self_attn.k_norm")
            put(block.gate_up.weight, f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
            put(block.down.weight, f"{layer}.mlp.down_proj")
        assert not left, f"no place for {sorted(left)}"
