"""x [..., in] -> x W^T + b [..., out], W [out, in]: every linear layer, whose rows are few in a step of decoding."""
