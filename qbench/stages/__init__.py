"""Pipeline steps: one file each, found by being there."""
