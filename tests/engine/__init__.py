"""The engine by itself: sampler, detokenizer, scheduler and worker on real MLX."""
