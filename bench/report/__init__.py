"""Figures and pages, drawn and written from the committed CSV files alone, and the demo."""
