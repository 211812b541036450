"""Encoders in the forms in which others load them, one file a family of formats."""
