"""Causal softmax attention. q: [B, T, H, K]; k, v: [B, S, Hkv, K], each kv head shared by H / Hkv query heads."""
