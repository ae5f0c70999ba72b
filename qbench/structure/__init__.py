"""What a model is made of: blocks, linear weights, what they read and how scales may move between them."""
