"""Selective scan: the state space of Mamba-1, whose N numbers a channel each decay at a rate of their own.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t        y_t = S_t C_t

x, dt: [B, T, D]; A: [D, N], negative; B, C: [B, T, N], shared by all channels; S: [B, D, N], at least float32.
"""
