"""What only a GPU can show: correctness, cost and quality on CUDA, in parts that fit into minutes."""
