"""Denoiser and classifier architectures, one family per file."""
