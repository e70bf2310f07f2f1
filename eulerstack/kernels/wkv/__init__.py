"""RWKV-4's weighted mean of values: of what came before with an exponential decay, and of the token with a bonus.

    y_t = (sum over i < t of e^{k_i - (t-1-i) w} v_i  +  e^{u + k_t} v_t) / (the same without v)

k, v: [B, T, D]; w (positive), u: [D]. The state is (total, weight, top), [B, D] each and at least float32: the two
sums scaled by e^{-top}, top_t = max(top_{t-1} - w, k_t). Where weight is zero, nothing was summed yet.
"""
