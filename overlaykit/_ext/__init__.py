"""The compiled kernels; each is built from the file of its name in ext/. Only tree/ and overlay/ import them."""
