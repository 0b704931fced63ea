"""What the book's notebooks use: their first cell, tables, stored measurements, figures, widgets and exercises."""
