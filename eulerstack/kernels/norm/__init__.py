"""RMSNorm: x / rms(x) * weight [D] over each of `groups` equal parts of x [..., D], statistics at least float32."""

RMS_EPS = 1e-6
