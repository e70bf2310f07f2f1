"""What the v1 language knows and this one refuses by name: why, and what to write instead."""

KEYS = {
    "capacity_factor": (
        "would drop tokens by what comes after them, which is not causal: no token is dropped here",
        "remove it",
    ),
    "compatibility": (
        "is not supported: precision is model.dtype, in which decays and recurrent states stay float32",
        "remove it",
    ),
    "compression": ("is not supported (CSA, HCA, NSA)", "write latent_dim for a small cache, or a window"),
    "depth_gating": (
        "is not supported: the top k of a sequence depend on its later tokens, which is not causal",
        "remove it; an ffn of type moe chooses by token",
    ),
    "execution_modes": ("is not supported, and would change nothing in a model", "remove it"),
    "hyper": ("is not supported (hyper-connections)", "remove it, and write residual.type: sequential or parallel"),
    "integrator": ("is not supported (ODE integrators)", "repeat one entry with `shared`, its step residual.scaling"),
    "memory": (
        "is not supported (Titans and other memories that learn at inference)",
        "remove it; the states of retnet and mamba are memories of fixed size",
    ),
    "merge": ("is not supported (parallel streams)", "put mixers side by side in one layer: mixer.type: branched"),
    "pad_token": ("is not needed: padding is masked, and no token stands for it", "remove it"),
    "parallel": ("is not supported (parallel streams)", "put mixers side by side in one layer: mixer.type: branched"),
    "shape_change": ("is not supported: all layers have d_model channels", "remove it"),
    "transition": ("is not supported, and would change nothing in a model", "remove it"),
    "ttt": ("is not supported (layers that learn at inference)", "write mixer.type: retnet with gamma: gated"),
    "window_dilation": ("is not supported (dilated windows)", "remove it; `window: N` sees the last N tokens"),
}
"""Keys."""

VALUES = {
    "csa": "compressed attention is not supported",
    "dilated": "windows are not supported",
    "dynamic": "scales by the sequence's length, so that a prefix would change as it grows",
    "h3": "is not one of the mixers",
    "hyper_connection": "is not supported",
    "nsa": "attention is not supported",
    "top_k": "would choose among branches that are all computed anyway, and is not supported",
    "ttt_layer": "is not supported; a retnet with gamma: gated is the nearest mixer",
}
"""Words where the language takes others; what is allowed follows."""
