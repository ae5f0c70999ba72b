"""Models: loading full-precision ones, the architecture without weights, the shipped tiny model."""
