"""Texts, the token windows drawn from them, and the statistics collected over those windows."""
