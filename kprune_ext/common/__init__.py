"""Code that both packages share: files, processes, devices, text. Imports neither of them."""
