"""A small script that stands where timm's train.py would: it says what it was given, and does one thing."""

import json
import os
import signal
import sys

import timm
import torch


class Sizes(torch.utils.data.Dataset):
    """Made in a worker: the sizes of a model of the package's and of one that carries its layer."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        models = timm.create_model("eca_resnet18", device="meta"), timm.create_model("resnet18", attn_layer="eca")
        return os.getpid(), [sum(p.numel() for p in model.parameters()) for model in models]


def tell():
    told = {"argv": sys.argv, "stdin": sys.stdin.read(), "timm": timm.__file__, "pid": os.getpid()}
    print(json.dumps(told | {"registered": timm.is_model("eca_resnet18"), "file": __file__}))


def workers(method):
    loader = torch.utils.data.DataLoader(Sizes(), num_workers=1, multiprocessing_context=method, batch_size=None)
    ((pid, sizes),) = loader
    print(json.dumps({"child": pid != os.getpid(), "parameters": sizes}))


def wait():
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
    print("ready", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["exit", code]:
            sys.exit(int(code) if code.isdigit() else code)
        case ["raise"]:
            raise ZeroDivisionError("of the script")
        case ["workers", method]:
            workers(method)
        case ["wait"]:
            wait()
        case _:
            tell()
