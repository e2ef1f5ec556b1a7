"""The layers of the CORDA adapter."""
