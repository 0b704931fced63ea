"""Work with adapters on a model: place them, merge them, save and load them, and check their files."""
