"""The pass over the blocks: it streams blocks and hidden states and knows no algorithm."""
