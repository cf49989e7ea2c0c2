"""One module per family of models: how its checkpoints are loaded."""
