"""Continues prompts greedily in llama.cpp, for `llama_cpp.py`, which runs this file elsewhere.

It reads a task as JSON from the standard input, and prints the result as JSON. It imports nothing of
this repository, as that environment has only llama-cpp-python.
"""

from __future__ import annotations

import json
import sys
from itertools import islice

FLOAT32 = 0  # of ggml


def main() -> None:
    """Runs one task."""
    import llama_cpp
    import numpy as np

    task = json.load(sys.stdin)
    longest = max(map(len, task["ids"])) + task["new_tokens"]
    model = llama_cpp.Llama(
        task["file"],
        n_ctx=longest + 8,
        n_batch=longest + 8,
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        type_k=FLOAT32,
        type_v=FLOAT32,
        logits_all=True,
        verbose=False,
    )
    encoded = [model.tokenize(text.encode(), add_bos=True, special=True) for text in task["texts"]]
    continuations, logits = [], []
    for ids in task["ids"]:
        model.reset()
        steps = model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        first = next(steps)
        logits.append(np.array(model.scores[len(ids) - 1]))
        continuations.append([first, *islice(steps, task["new_tokens"] - 1)])
    np.save(task["logits"], np.stack(logits))
    result = {
        "version": llama_cpp.__version__,
        "architecture": model.metadata["general.architecture"],
        "ids": encoded,
        "continuations": continuations,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
