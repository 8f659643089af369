"""Parts of softmax attention that its mixers are made of: fields, positions, cache, codes."""
