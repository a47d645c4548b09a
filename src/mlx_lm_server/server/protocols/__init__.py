"""The protocols that clients speak, beside each other, and what they share."""
