"""How nano, the bundled demonstration model, is made: corpus, training, export, scores."""
