"""Plain PyTorch and NumPy definitions of everything that C++ or Triton does faster."""
