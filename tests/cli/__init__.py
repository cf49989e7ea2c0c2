"""The commands of `mlxgui`, run as a user does, in processes of their own."""
