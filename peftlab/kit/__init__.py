"""What the book's notebooks use: the first cell, tables, stored measurements, figures, widgets and exercises."""
