"""Every kind of client runs the main job against the real program."""
