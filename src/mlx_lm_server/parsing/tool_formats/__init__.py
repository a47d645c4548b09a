"""How models write calls of tools: one script per format."""
