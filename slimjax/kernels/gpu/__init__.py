"""Pallas kernels for Hopper GPUs (Mosaic GPU): what ``implementation="pallas_gpu"`` runs."""
