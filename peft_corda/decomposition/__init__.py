"""Pure mathematics: a weight, statistics of its inputs and a rank give directions and factors."""
