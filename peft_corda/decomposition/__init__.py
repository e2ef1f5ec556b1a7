"""Pure mathematics: directions and factors from a weight, statistics of its inputs and a rank."""
