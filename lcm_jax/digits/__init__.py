"""The demonstration, whole: its data set, tokenizer and classifier, and what is measured of its models."""
