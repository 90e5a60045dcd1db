"""The captioned-digits demonstration: data set, presets, tokenizer, classifier and evaluation."""
