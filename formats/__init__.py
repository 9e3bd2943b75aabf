"""Other people's files: tensors, weights by name, tokenizers, chat templates, PaddleNLP's arguments."""
