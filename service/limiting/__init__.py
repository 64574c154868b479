"""How often a key may ask, and where that is counted."""
