"""Measures of how well a model of the captioned digits draws what it is asked for."""
