"""Writes a trained encoder, with a model card, in the layouts that other libraries load."""
