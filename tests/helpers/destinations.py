"""What a folder holds, and commands that write to a destination."""


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def init(made, output, **more):
    given = {
        "model": made / "llama", "factors": made / "factors.safetensors", "r": 4, "device": "cpu",
        "output": output,
    } | more  # fmt: skip
    return ["init", *(f"--{key}={value}" for key, value in given.items())]


def calibration(made, output, **more):
    given = {"model": made / "llama", "data": made / "data.txt", "output": output, **more}
    return ["calibrate", *(f"--{key}={value}" for key, value in given.items())]


def pruning(out, **more):
    given = {"model": "no-such-model", "data": "no-such.txt", "output": out, **more}
    return ["prune", *(f"--{key}={value}" for key, value in given.items())]
