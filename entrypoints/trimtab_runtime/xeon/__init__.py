"""What makes training fast on a Xeon: allocator, attention for packed rows, loss without full logits."""
