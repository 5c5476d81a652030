"""From a finished run to transcripts."""
