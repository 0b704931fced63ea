"""What one does with adapters on a model: place them, merge them, save them, and tell whether their files are whole."""
