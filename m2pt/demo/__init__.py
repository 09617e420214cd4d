"""A pathway from handwritten digits to speech, small enough for a laptop's CPU."""
