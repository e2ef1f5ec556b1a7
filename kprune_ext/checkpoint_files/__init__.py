"""The files of a pruned model: what is saved beside the weights, and checks of what is loaded."""
