"""Training recipes: the classifier, the diffusion model and its ADDT fine-tuning, all seeded."""
