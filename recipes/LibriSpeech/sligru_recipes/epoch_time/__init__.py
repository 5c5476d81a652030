"""How long an epoch takes with our RNNs and with SpeechBrain's."""
