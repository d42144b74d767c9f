"""The fused kernels and what compiles, serves and compares them."""
