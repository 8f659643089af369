"""Parts of softmax attention that its mixer is made of."""
