"""Measurements of a model: one file per evaluator."""
