"""What a cache scheme costs, from formulas alone: bytes, reads, operations and a bound on the time of a token.

`architectures` and `chips` are data, `model` has the formulas of one attention layer, `workload` those of a whole
model at work, `hf` reads a model's dimensions from a Hugging Face `config.json`. The tables of arXiv 2503.05840
follow from them (`paper`).
"""
