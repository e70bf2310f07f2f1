"""State-space duality (Mamba-2): a selective state space whose transition is a scalar a head.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t

x: [B, T, H, P]; dt: [B, T, H], positive; A: [H], negative; B, C: [B, T, G, N]; S: [B, H, P, N], at least float32.
"""
