"""The explorer: neurons and latents with their examples, clusters and measures, in one HTML file."""
