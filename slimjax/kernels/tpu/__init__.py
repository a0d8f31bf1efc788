"""Pallas kernels for TPU: what ``implementation="pallas_tpu"`` runs."""
