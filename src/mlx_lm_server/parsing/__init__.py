"""Pure, incremental parsing of what a model says."""
