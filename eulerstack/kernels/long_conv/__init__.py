"""Long causal convolution, a filter a channel over a whole document: y_t = sum over s <= t of taps[t - s] x_s.

x: [B, T, D]; taps: [S, D], at least float32 and as long as any position that is reached; the state is the documents'
inputs so far, [B, S, D], the token at position p in slot p.
"""
