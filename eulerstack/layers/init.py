"""Linear weights from one normal distribution (Radford et al. 2019), in place of what each mixer's paper draws."""

from torch import nn

from .moe import StackedLinear

STD = 0.02
OUTPUTS = ("o_proj", "out_proj", "down_proj")
OWN = ("filter", "dt_proj")
"""What keeps its own start: Hyena's filter network, and Mamba's dt. What is not linear is left alone anyway."""


def is_drawn_normal(path: str) -> bool:
    """Whether `draw_normal` draws the linear layer of this name."""
    return not set(OWN) & set(path.split("."))


def draw_normal(layer: nn.Module, out_scale: float) -> None:
    """Draw a layer's linear weights from N(0, 0.02), those into the residual stream times `out_scale`."""
    for name, part in layer.named_modules():
        if isinstance(part, nn.Linear | StackedLinear) and is_drawn_normal(name):
            nn.init.normal_(part.weight, std=STD * (out_scale if name.rpartition(".")[2] in OUTPUTS else 1.0))
