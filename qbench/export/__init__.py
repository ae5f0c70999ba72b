"""Writing quantized models for others: one file per target."""
