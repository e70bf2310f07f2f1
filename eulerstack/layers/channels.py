"""The channel mixer that a spec names."""

from torch import nn

from ..spec import FFNSpec, GatedMLPSpec, MLPSpec, MoEFFNSpec
from .ffn import MLP, GatedMLP, init_linear, matmul_flops
from .moe import MoE
from .share import Share, Split


def make_ffn(spec: FFNSpec, width: int, hidden: int) -> nn.Module | None:
    """The channel mixer a spec names; None for `type: none`."""
    if isinstance(spec, MLPSpec):
        return MLP(spec, width, hidden)
    if isinstance(spec, GatedMLPSpec):
        return GatedMLP(spec, width, hidden)
    return MoE(spec, width, hidden) if isinstance(spec, MoEFFNSpec) else None


def split_ffn(ffn: nn.Module, share: Share) -> Split:
    """Become one rank's share, by hidden channels: see `Mixer.split`. Raises ValueError where they do not divide."""
    if isinstance(ffn, MLP | GatedMLP | MoE):
        return ffn.split(share)
    raise ValueError(f"{type(ffn).__name__} has no plan for tensor parallelism; train it with tensor_parallel 1")


def init_ffn(ffn: nn.Module, out_scale: float) -> None:
    """Draw the weights anew; the projection into the residual stream is scaled by `out_scale`."""
    if isinstance(ffn, MoE):
        ffn.reset_parameters(out_scale)
        return
    for name, layer in ffn.named_children():
        init_linear(layer, out_scale if name == "down_proj" else 1.0)


def ffn_flops(ffn: nn.Module | None, tokens: int) -> int:
    """Forward FLOPs over `tokens` tokens."""
    if isinstance(ffn, MoE):
        return ffn.flops(tokens)
    return 0 if ffn is None else matmul_flops(ffn, tokens)
