"""Makes tokens of logits."""
