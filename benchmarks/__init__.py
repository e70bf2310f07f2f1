"""Speed as ratios, side by side in one process with peers: never a timed test."""
