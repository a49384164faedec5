"""dbp-bench: how robust diffusion-based purification is, and where the robustness comes from."""

__version__ = "0.1.0"
