"""Short causal convolution, one filter a channel: silu(y), y_t = bias + sum over j < W of weight[:, W-1-j] x_{t-j}.

x: [B, T, D]; weight: [D, W]; the state is the last W - 1 inputs, [B, W-1, D].
"""
