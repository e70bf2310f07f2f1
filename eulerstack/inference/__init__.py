"""Writing text from a trained stack through its state."""
