"""Short causal convolution, one filter a channel: y_t = bias + sum over j of weight[:, W-1-j] x_{t-j}, j < W.

x: [B, T, D]; weight: [D, W]; the state is the last W - 1 inputs, [B, W-1, D].
"""
