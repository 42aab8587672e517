"""How fast trained models run: time to first token, and where it goes."""
