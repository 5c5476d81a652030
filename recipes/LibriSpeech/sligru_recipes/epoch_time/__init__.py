"""How long an epoch takes with SpeechBrain's parts and with ours."""
