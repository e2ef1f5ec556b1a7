"""The CORDA adapter: PEFT layers and a PEFT model that train the factors."""
