"""One worker process per loaded model: what runs in it, and the control side that supervises it."""
