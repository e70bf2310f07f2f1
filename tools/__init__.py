"""What makes files that are committed."""
