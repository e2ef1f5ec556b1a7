"""How good a pruned model is: agreement with the original, accuracy and speed, for its report."""
