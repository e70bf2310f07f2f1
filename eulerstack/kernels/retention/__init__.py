"""Retention: linear attention whose memory decays by a scalar a head and a token.

    S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t        y_t = q_t S_t

q, k: [B, T, G, K]; v: [B, T, H, V], each of the G query heads shared by H / G value heads;
log_decay: [H] (the same at every token) or [B, T, H]; S: [B, H, K, V], at least float32.
"""
