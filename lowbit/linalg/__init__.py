"""Pure mathematics; nothing here knows what a model is."""
