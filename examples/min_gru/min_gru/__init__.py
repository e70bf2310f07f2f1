from typing import ClassVar

from pydantic import Field

from eulerstack.spec import ExtensionSpec


class MinGRUSpec(ExtensionSpec):
    """minGRU's options: a gated recurrence of expand * d_model channels. No torch is loaded to validate them."""

    MIXER: ClassVar = "min_gru.mixer:MinGRU"
    expand: int = Field(1, ge=1, le=8)
    chunk_size: int = Field(64, ge=1)
