"""Training a recogniser or a language model."""
