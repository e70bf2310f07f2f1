"""Text to batches of tokens, in an order that can be resumed to the bit. Lightning's part of it is training/data.py."""
