"""Everything that turns a model's folder into facts: its tokenizer, its templates, its formats."""
