"""Factors in a PEFT adapter."""
