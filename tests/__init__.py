"""Tests of the real program; only the models are small."""
