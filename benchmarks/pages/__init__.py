"""The documentation's tables and pictures, made from the committed results."""
