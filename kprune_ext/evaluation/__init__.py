"""How good and how fast a model is: scores on labelled data, and models compared by them."""
