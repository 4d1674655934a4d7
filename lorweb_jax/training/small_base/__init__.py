"""What the small base's jobs train on and by: canvases and captions, losses. Imports jax, flax and optax alone, so that
tools/gpu_base.py runs it where nothing else is installed."""
