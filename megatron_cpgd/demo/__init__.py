"""What `make demo` trains: a small model with bad habits in arithmetic, made on the spot."""
