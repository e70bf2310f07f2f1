"""The parts of a layer that are no mixers: norms, channel mixing, rotary phases."""
