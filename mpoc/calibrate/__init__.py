"""Networks run on data: second moments of what goes into each layer, and of the gradients behind it."""
