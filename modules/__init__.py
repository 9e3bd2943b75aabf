"""Parts of the decoder: layers, positions, vocabulary, LoRA, low-bit linears."""
