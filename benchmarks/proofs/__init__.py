"""Long proofs of accuracy, each with a short form: ``python -m benchmarks.proofs [--short]``."""
