"""LibriSpeech, a synthetic corpus in its layout, and a simulated one of its lengths."""
